"""Race speculative decoding against plain decoding: one text at a time, for a model and a draft of its vocabulary."""

from __future__ import annotations

import argparse
import statistics
import time

import gptcli
from gptcli.config.schema import SamplingParams
from gptcli.generate import Completion, Engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("draft")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prompts", nargs="+", default=["", "The ", "import "])
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()

    loaded = gptcli.load(
        options.checkpoint, draft=options.draft, device=options.device, precision=options.precision
    ).engine
    contestants = {"plain": Engine(loaded.model, loaded.tokenizer, dtype=loaded.dtype)} | {
        f"draft {k}": Engine(loaded.model, loaded.tokenizer, draft=loaded.draft, draft_tokens=k, dtype=loaded.dtype)
        for k in options.draft_tokens
    }
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, ignore_eos=True, seed=1
    )
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    done: dict[str, list[Completion]] = {}
    for turn in range(options.rounds + 1):
        for name, engine in contestants.items():
            start = time.perf_counter()
            done[name] = [engine.generate([prompt], params)[0] for prompt in options.prompts]
            if turn:  # the first warms up
                rates[name].append(sum(len(c.ids) for c in done[name]) / (time.perf_counter() - start))
    base = statistics.median(rates["plain"])
    for name, found in rates.items():
        rate, drafts = statistics.median(found), [c.draft for c in done[name] if c.draft is not None]
        accepted = f"{sum(d.accepted for d in drafts)} of {sum(d.proposed for d in drafts)} accepted" if drafts else ""
        print(f"{name:<12}{rate:>10,.1f} tok/s  {rate / base:.2f}x  {accepted}")


if __name__ == "__main__":
    main()
