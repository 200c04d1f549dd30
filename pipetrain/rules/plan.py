"""Rules about plans and the devices that they are made for."""

import math

from pipetrain.config import Config


def check_plan(cfg: Config, problems: list[str]) -> None:
    """Adds what is wrong with the settings by themselves."""
    plan = cfg.plan
    if cfg.action != "plan":
        for key, value in (("plan.device", plan.device and plan.device.name), ("plan.devices", plan.devices)):
            if value:
                problems.append(f"{key}={value} asks what would be elsewhere: it goes with action=plan")
    if plan.devices is not None and (not plan.devices or min(plan.devices) < 1):
        problems.append(f"plan.devices={plan.devices} must be numbers of devices, such as plan.devices=[8,128]")
    if plan.device is None:
        return
    if plan.profile is not None:
        problems.append(
            f"plan.profile={plan.profile} was measured, and plan.device={plan.device.name} is described: leave one out"
        )
    for key, value in vars(plan.device).items():
        if key != "name" and not 0 < value < math.inf:
            problems.append(f"plan.device.{key}={value} of {plan.device.name} must be greater than 0 and finite")
    if plan.device.name.startswith(("cpu", "cuda")):
        problems.append(
            f"plan.device.name={plan.device.name} would be a device of this machine; give it another name, such as "
            "plan.device.name=X"
        )
    if plan.device.efficiency > 1:
        problems.append(
            f"plan.device.efficiency={plan.device.efficiency} of {plan.device.name} is the share of its speeds that "
            "training reaches: above 0, at most 1"
        )
