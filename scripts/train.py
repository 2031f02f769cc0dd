"""Trains a model, or goes on where a run stopped.

python scripts/train.py --config tiny --run-dir runs/tiny data.train=runs/tiny-data
python scripts/train.py --config my_run.py --run-dir runs/mine schedule.lr=1e-3 seed=1
python scripts/train.py --config my_run.py --run-dir runs/mine --mesh fsdp=4,expert=2
python scripts/train.py --config my_run.py … start_from=DIR        a converted checkpoint, or a run
python scripts/train.py --config my_run.py … --mesh fsdp=8,expert=16 --coordinator auto    per host
"""

from __future__ import annotations

import argparse
import sys


def parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="train.py", description="Trains a model, or goes on where a run stopped."
    )
    ap.add_argument("--config", required=True, metavar="NAME|FILE", help="see training/configs")
    ap.add_argument("--run-dir", metavar="DIR", help="default: runs/<name of the run>")
    ap.add_argument("--until", type=int, metavar="STEP", help="stop there; default: the end")
    ap.add_argument(
        "--mesh",
        metavar="AXIS=N,…",
        help="devices that share a step: data, fsdp, expert, context; the same as mesh=AXIS=N,…",
    )
    ap.add_argument(
        "--coordinator",
        metavar="HOST:PORT|auto",
        help="address of host 0; start the same command on every host, with a run directory that "
        "all of them see; auto: ask the environment (TPU pods, Slurm)",
    )
    ap.add_argument("--hosts", type=int, metavar="N", help="how many there are")
    ap.add_argument("--host-index", type=int, metavar="I", help="which one this is")
    ap.add_argument("--show", action="store_true", help="print the plan and stop")
    ap.add_argument("changes", nargs="*", metavar="key=value", help="e.g. schedule.lr=1e-3")
    return ap


def show(run) -> None:
    """Prints the stages of a run."""
    from dsv4_jax.params import count_params

    plan, count = run.plan(), count_params(run.model)
    print(f"{run.name}: {count.total:,} parameters, {count.active:,} active")
    for stage in plan.stages:
        phase = stage.phase
        print(
            f"from step {stage.first_step:>7}: {phase.name}, {stage.steps} steps of {stage.rows} × "
            f"{phase.seq_len} tokens, {phase.attention}, learns {phase.learn}"
        )
    print(f"{plan.steps:,} steps, {plan.tokens:,} tokens")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from dsv4_jax.training.run import load_run

    try:
        mesh = [f"mesh={args.mesh}"] if args.mesh else []
        run = load_run(args.config, [*args.changes, *mesh])
        if args.show:
            show(run)
            return 0
        import jax

        from sharding.processes import join
        from sharding.tpu import overlap_messages

        overlap_messages()
        join(args.coordinator, args.hosts, args.host_index)
        from checkpoints.load import load_checkpoint
        from dsv4_jax.training.loop import Trainer

        trainer = Trainer(run, args.run_dir or f"runs/{run.name}", load=load_checkpoint)
        complete = trainer.train(args.until)
        trainer.close()
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    if jax.process_index() == 0:
        print("complete" if complete else f"at step {trainer.step} of {trainer.plan.steps}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
