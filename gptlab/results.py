def update(sweep, running, *, picture):
    return "\n".join(f"{job.folder} {job.values} {sweep.state(job)}" for job in sweep.jobs)
