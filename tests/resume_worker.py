"""What test_resume.py starts in a process of its own: `resume_worker.py FOLDER SCENARIO`.

It imports once and forks for every run: each of them is as fresh as a new process, and may be killed.
"""

import functools
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import distributed_worker
import test_resume as law
import torch
import torch.distributed as dist
import transformers as tf

from hf_oto import OTOTrainer, ending, shrinking, whole

torch.set_num_threads(1)
whole.measure = functools.partial(whole.measure, seconds=0)
ending.save_figures = lambda *_: None
EVERY = dict(save_strategy="steps", save_steps=4)


def in_a_process(run, *given):
    """Runs a function in a process that is as this one is now, and returns its status: 0, or minus a signal."""
    child = os.fork()
    if child == 0:
        try:
            run(*given)
        except BaseException as error:
            print(f"{run.__name__}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# killed ----------------------------------------------------------------------------------------------


class KilledAt(tf.TrainerCallback):
    """Kills the process at the end of a step, which no handler hears of."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_in_training(folder):
    law.trained(folder, callbacks=[KilledAt()], **EVERY)


def killed_in_saving(folder):
    """With half of the optimizer's file written."""
    right = torch.save

    def save(value, path, *args, **kwargs):
        right(value, path, *args, **kwargs)
        if "checkpoint-8" in str(path) and str(path).endswith("optimizer.pt"):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save
    law.trained(folder, **EVERY)


def killed_in_a_cut(folder):
    """In the second one: what the last checkpoint holds has been cut once."""
    right, kill = shrinking.certify, lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    def certify(*given):
        shrinking.certify = kill
        return right(*given)

    shrinking.certify = certify
    law.trained(folder, **EVERY)


def killed_in_the_end(folder):
    whole.measure = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    law.trained(folder, **EVERY)


def ended(folder, resume=None, cls=OTOTrainer):
    """A run that comes to its end, and what it ended with."""
    trainer = law.trained(folder, cls=cls, seed=0 if resume is None else 1, resume=resume, **EVERY)
    found = {"weights": distributed_worker.whole_state(trainer.model), "plan": trainer.plan.to_json()}
    torch.save(found, folder / f"ended{cls.__name__}.pt")


def kills(folder):
    assert in_a_process(ended, folder / "whole") == 0
    for killed in (killed_in_training, killed_in_saving, killed_in_a_cut, killed_in_the_end):
        there = folder / killed.__name__
        assert in_a_process(killed, there) == -signal.SIGKILL
        if killed is killed_in_saving:
            shutil.copytree(there, folder / "forgetting")
            assert in_a_process(ended, folder / "forgetting", True, law.Forgetting) == 0
        assert in_a_process(ended, there, True) == 0


# several ranks ---------------------------------------------------------------------------------------


def result(trainer):
    return {"weights": distributed_worker.whole_state(trainer.model), "plan": trainer.plan.to_json()}


def ddp(rank, folder):
    """Resumed, and interrupted and begun anew, each beside the run that it has to be like."""
    whole = law.trained(folder / "whole", save_strategy="steps", save_steps=6)
    again = law.trained(folder / "again", seed=1, resume=law.checkpoint(whole, 6))
    found = {"whole": result(whole), "resumed": result(again)}
    for cls in (OTOTrainer, law.GoingOn):
        trainer = law.interrupted(folder / cls.__name__, 7, cls)
        model = law.whole_copy(trainer.model)
        tf.set_seed(42)
        trainer.train()
        found[f"anew {cls.__name__}"] = result(trainer)
        found[f"new {cls.__name__}"] = result(law.trained(folder / f"new {cls.__name__}", model=model))
    return found


def fsdp2(rank, folder):
    """Interrupted while it is sharded, and begun anew, or resumed."""
    distributed_worker.force_fsdp2()
    config = {"state_dict_type": "FULL_STATE_DICT", "transformer_layer_cls_to_wrap": ["BertLayer"]}
    more = {"name": "bert", "fsdp": True, "fsdp_config": config, "save_strategy": "steps", "save_steps": 6}
    whole = law.trained(folder / "whole", **more)
    found = {"whole": result(whole)}
    for resume in (None, True):
        trainer = law.interrupted(folder / f"resumed {resume}", 7, **more)
        trainer.train(resume_from_checkpoint=resume)
        found[f"resumed {resume}"] = result(trainer) | {"sparsity": trainer.report["group_sparsity"]}
    return found


def of_a_rank(rank, scenario, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    dist.init_process_group("gloo")
    (folder / scenario.__name__).mkdir(exist_ok=True)
    torch.save(scenario(rank, folder / scenario.__name__), folder / f"{scenario.__name__}.{rank}.pt")


def ranks(folder):
    for scenario in (ddp, fsdp2):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            os.environ["MASTER_PORT"] = str(s.getsockname()[1])
        torch.multiprocessing.start_processes(of_a_rank, (scenario, folder), 2, start_method="fork")


if __name__ == "__main__":
    {"kills": kills, "ranks": ranks}[sys.argv[2]](Path(sys.argv[1]))
