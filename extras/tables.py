"""The tables of the READMEs, in Markdown, from results/; `python -m extras.plot` prints them. Rows: the runs there."""

import itertools
import statistics

from extras.recorded import (
    CEILING,
    LAMBDAS,
    PAPER,
    PAPER_ALFWORLD,
    RESULTS,
    baseline,
    finals,
    lambda_runs,
    metrics,
    read,
    runs,
    shown,
)

TRIED = {           # folder of results/: what its value head is
    "tried/raw-value-numberline-seed1": "raw: raw inputs, learned through the model, as in the paper",
    "tried/raw-value-numberline-seed2": "raw",
    "tried/raw-value-lr1e-4-numberline-seed2": "raw, half the learning rate",
    "tried/raw-value-lr1e-4-numberline-seed3": "raw, half the learning rate",
    "tried/raw-value-norm0.1-numberline-seed2": "raw, gradients scaled down to a norm of 0.1",
    "tried/value-gradient-numberline-seed2": "standardised inputs, learned through the model",
    "tried/value-lr2e-4-numberline-seed2": "apart: standardised inputs, no gradient into the model",
    "tried/value-lr1e-3-numberline-seed2": "apart, `value_lr` 1e-3, no value clip",
    "tried/value-stops-numberline-seed1": "as now, but V stops where `target_kl` stops the policy",
    "tried/value-stops-numberline-seed2": "V stops likewise",
    "tried/value-stops-numberline-seed3": "V stops likewise",
    "runs/numberline-seed1": "now: `advantage_floor` 1 (0.25 above), gradients clipped apart, V learns on",
    "runs/numberline-seed2": "now",
    "runs/numberline-seed3": "now"}
KINDS = {"pick_and_place_simple": "place", "look_at_obj_in_light": "look in light",
         "pick_clean_then_place_in_recep": "clean", "pick_heat_then_place_in_recep": "heat",
         "pick_cool_then_place_in_recep": "cool", "pick_two_obj_and_place": "place two"}
# Settings changed one at a time, as run_all.sh names them.
SEARCH = ("lr 1e-4", "lr 4e-4", "temperature 0.3", "temperature 0.8", "rank 8", "rank 128")


def markdown(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def table():
    """The main table: held-out success in %, mean ± half of its 95 % interval over the seeds; the paper's rows."""
    starts = {task: baseline(task, "start") for task in PAPER}
    rows = []
    for at, file in (("0.5, where PPO alone starts", "start-temperature-0.5"), ("0.3, where RL starts", "start"),
                     ("0.1, where RL ends", "start-temperature-0.1")):
        found = starts | {"points24": baseline("points24", file)}
        cells = _with_average([f"{share:.1f}" for share in found.values()])
        rows.append([f"SFT start; Points24 at temperature {at}", *cells])
    for name, variant in (("**RL**", ""), ("RL, PPO alone", "plain"), ("RL without CoT", "no-cot"),
                          ("RL on features, no language model", "features")):
        folders = [runs(task, variant) or runs(task) for task in PAPER]             # "plain": Points24 alone differs
        common = set.intersection(*({folder.name[-1] for folder in own} for own in folders))
        average = [statistics.fmean(seeds) for seeds in
                   zip(*(finals([folder for folder in own if folder.name[-1] in common]) for own in folders))]
        rows.append([name, *(f"**{shown(values)}**" if not variant else shown(values)
                             for values in (*map(finals, folders), average))])
    rows.append(["exact ceiling: solvable deals; best play", *_with_average([str(CEILING[task]) for task in PAPER])])
    for name, key in (("SFT, 7B", "SFT"), ("RL, 7B", "RL"), ("RL without CoT, 7B", "no CoT"), ("CNN + RL", "CNN"),
                      ("GPT-4V", "GPT-4V"), ("Gemini", "Gemini")):
        rows.append([f"the paper: {name}", *_with_average([str(PAPER[task][key]) for task in PAPER]),
                     str(PAPER_ALFWORLD[key])])
    return markdown(["success, %", *PAPER, "average", "ALFWorld's data set (not run here)"],
                    [row if len(row) == 7 else [*row, "–"] for row in rows])


def _with_average(cells):
    return [*cells, f"{statistics.fmean(map(float, cells)):.1f}"]


def families():
    """The same RL on pocket models of other families; "" as long as there is no run for it."""
    rows = []
    for task in PAPER:
        if others := runs(task, "qwen3_vl"):
            rows.append([task, f"{baseline(task, 'start'):.1f} → {shown(finals(runs(task)))}",
                         f"{baseline(task, 'qwen3_vl-start'):.1f} → {shown(finals(others))}",
                         f"{shown(finals(others, 'parse_rate'))}", f"{shown(finals(others, 'reading_rate'))}"])
    return markdown(["success, %", "LLaVA-NeXT: start → RL", "Qwen3-VL: start → RL", "its answers parsed",
                     "its pictures read"], rows) if rows else ""


def households():
    """ALFWorld in small houses: held-out success in all and by kind of task; "" as long as there is no run."""
    if not runs("alfworld"):
        return ""
    rows, found = [], {name: [RESULTS / "baselines" / f"alfworld-{file}.json"] for name, file in {
        "uniform random": "random", "heuristic without memory": "heuristic", "demonstrator with memory": "expert",
        "start (SFT)": "start", "start, asked for the action alone": "start-no-cot"}.items()}
    found |= {name: [folder / "eval.json" for folder in runs("alfworld", variant)] for name, variant in {
        "**RL**": "", "RL without CoT": "no-cot", "RL, λ 0": "lambda-0", "RL, λ 0.5": "lambda-0.5"}.items()}
    for name, files in found.items():
        if results := [read(file) for file in files if file.exists()]:
            rows.append([name, shown([100 * result["success"] for result in results]) if name[-1] == "*" or "RL" in name
                         else f"{100 * results[0]['success']:.1f}",
                         *(f"{100 * statistics.fmean(result['success_by_kind'][kind] for result in results):.0f}"
                           for kind in KINDS)])
    return markdown(["held-out houses, success, %", "all", *KINDS.values()], rows)


def references():
    """What needs no RL, measured on the same deals, and the paper's other rows: success in %."""
    rows = []
    for task, paper in PAPER.items():
        cells = [f"{baseline(task, name):.1f}" for name in ("random", "constant", "expert", "start", "start-no-cot")]
        before = RESULTS / "baselines" / "pocket-two-lessons" / f"{task}.json"
        rows.append([task, *cells, f"{100 * read(before)['success']:.1f}" if before.exists() else "–",
                     *(str(paper[name]) for name in ("no CoT", "CNN"))])
    return markdown(["success, %", "random", "best constant action", "expert", "start",
                     "start, asked for the action alone", "start, before it was weakened", "paper: no CoT",
                     "paper: CNN"], rows)


def seeds():
    """Every main run: success with its 95 % Wilson interval, what its answers are like before → after, minutes."""
    keys = ("parse_rate", "reading_rate", "expert_agreement")
    rows = []
    for folder in itertools.chain.from_iterable(map(runs, PAPER)):
        task = folder.name.split("-")[0]
        end = read(folder / "eval.json")
        low, high = 100 * end["success_low"], 100 * end["success_high"]
        minutes = f"{read(folder / 'wall.json')['wall_s'] / 60:.0f}" if (folder / "wall.json").exists() else "–"
        rows.append([folder.name, f"{100 * end['success']:.1f} ({low:.1f} to {high:.1f})",
                     *(f"{baseline(task, 'start', key):.1f} → {100 * end[key]:.1f}" for key in keys), minutes])
    return markdown(["run", "success (95 % of these games)", "named a legal action", "read the picture right",
                     "played as the expert", "minutes"], rows)


def lambdas():
    """λ on both games, and how NumberLine was learned (means over seeds); "" as long as there is no run for it."""
    if not any(runs(task, f"lambda-{weight}") for task in ("numberline", "blackjack") for weight in LAMBDAS):
        return ""
    rows = [[f"{task}, success", *(shown(finals(lambda_runs(task, weight))) for weight in LAMBDAS)]
            for task in ("numberline", "blackjack")]
    measures = (
        ("first rollout that succeeds in 90 %", ".1f",
         lambda run: next((row["update"] for row in run if row["success"] >= 0.9), None)),
        ("updates that `target_kl` cut short", ".1f",
         lambda run: sum(row["minibatches"] < max(row["minibatches"] for row in run) for row in run)),
        ("answers parsed in a run's worst rollout, %, mean", ".0f",
         lambda run: 100 * min(row["parse_rate"] for row in run)),
        ("mean norm of the first update's gradients", ".2g", lambda run: run[0]["grad_norm"]))
    for name, form, measure in measures:
        cells = []
        for weight in LAMBDAS:
            found = [measure(metrics(folder)) for folder in lambda_runs("numberline", weight)]
            cells.append("–" if None in found or not found else f"{statistics.fmean(found):{form}}")
        rows.append([f"numberline, {name}", *cells])
    return markdown(["λ", *LAMBDAS], rows)


def trust_regions():
    """NumberLine, mean of the seeds: how far λ lets an answer move, set by other means (results/tried/README.md)."""
    folders = {"λ = 0.1": "runs/numberline-lambda-0.1-seed*",
               "λ = 1, clip 0.9, `target_kl` 10": "tried/lambda-1-wide-numberline-seed*",
               "λ = 1": "runs/numberline-lambda-1-seed*",
               "λ = 0.1, clip 0.01, `target_kl` 0.001": "tried/lambda-0.1-narrow-numberline-seed*"}
    rows = []
    for name, pattern in folders.items():
        rollouts = zip(*map(metrics, sorted(RESULTS.glob(pattern))))                # of each, one row a seed
        rows.append([name, *(f"{100 * statistics.fmean(row['success'] for row in seeds):.0f}"
                             for seeds in itertools.islice(rollouts, 8))])
    return markdown(["success in rollout, %", *map(str, range(1, 9))], rows)


def best_effort():
    """From a stronger start, with other settings (each run's command.txt); "" as long as there is no run for it."""
    rows = []
    for task in PAPER:
        for folder in runs(task, "best"):
            taught = read(RESULTS / "baselines" / f"{task}-best-sft.json")
            end, minutes = read(folder / "eval.json"), (taught["wall_s"] + read(folder / "wall.json")["wall_s"]) / 60
            low, high = 100 * end["success_low"], 100 * end["success_high"]
            rows.append([folder.name, f"{taught['steps']:,}", f"{baseline(task, 'best-start'):.1f}",
                         f"**{100 * end['success']:.1f}** ({low:.1f} to {high:.1f})", f"{baseline(task, 'expert'):.1f}",
                         f"{minutes:.0f}"])
    head = ["best effort", "batches of SFT", "SFT alone", "RL (95 % of these games)", "expert, same deals", "minutes"]
    return markdown(head, rows) if rows else ""


def decisions():
    """How often each Blackjack policy hits, by total: what the average does not show."""
    keys = ("hit_rate_to_11", "hit_rate_12_to_16", "hit_rate_from_17")
    found = {"the best play for wins, same deals": "baselines/blackjack-expert.json",
             "SFT start": "baselines/blackjack-start.json"}
    for name, variant in (("RL, seed", ""), ("RL without CoT, seed", "no-cot")):
        found |= {f"{name} {folder.name[-1]}": f"runs/{folder.name}/eval.json" for folder in runs("blackjack", variant)}
    rows = []
    for name, file in found.items():
        result = read(RESULTS / file)
        rows.append([name, *(f"{100 * result[key]:.0f} %" for key in keys), f"{100 * result['success']:.1f} %"])
    return markdown(["hits", "on 4 to 11", "on 12 to 16", "on 17 to 21", "wins"], rows)


def plans():
    """How often the formula games' written plan is right, and is followed."""
    rows = []
    for task in ("ezpoints", "points24"):
        found = {"SFT start": f"baselines/{task}-start.json"}
        if task == "points24":
            found = {"SFT start, temperature 0.5": "baselines/points24-start-temperature-0.5.json",
                     "SFT start, temperature 0.3": "baselines/points24-start.json",
                     "SFT start, temperature 0.1": "baselines/points24-start-temperature-0.1.json"}
        for name, variant in (("RL", ""), ("PPO alone", "plain")):
            found |= {f"{name}, seed {folder.name[-1]}": f"runs/{folder.name}/eval.json"
                      for folder in runs(task, variant)}
        for name, file in found.items():
            result = read(RESULTS / file)
            shares = (f"{100 * result[key]:.0f} %" for key in ("plan_rate", "plan_followed"))
            rows.append([f"{task}: {name}", *shares, f"{100 * result['success']:.1f} %"])
    return markdown(["formula games", "plan right while a solution is in reach", "next symbol follows the plan",
                     "success"], rows)


def sampling():
    """Points24 at the temperature where PPO alone plays, and where RL ends: what is sampling, what is learned."""
    alone = runs("points24", "plain")
    rows = [["SFT start", *(f"{baseline('points24', f'start-temperature-{at}'):.1f}" for at in ("0.5", "0.1"))],
            ["RL, PPO alone", shown(finals(alone)), shown([
                baseline("points24", f"{folder.name.removeprefix('points24-')}-temperature-0.1") for folder in alone])],
            ["**RL**", "–", f"**{shown(finals(runs('points24')))}**"]]
    return markdown(["points24, success, %", "at temperature 0.5", "at 0.1"], rows)


def experience():
    """Points24 by whether a run won a deal's numbers while it learned: its start beside it, at its last temperature."""
    found = [read(RESULTS / "baselines" / f"points24-plans-{name}.json")["by_experience"]
             for name in ("start-beside-seed1", "seed1")]
    rows = [[text, f"{100 * found[0][group]['share_of_solvable_deals']:.0f} %",
             *(" → ".join(f"{100 * own[group][key]:.0f}" for own in found)
               for key in ("won", "first_plan_right", "right_plan_followed"))]
            for text, group in (("that the run won while it learned", "won_in_training"), ("all others", "never_won"))]
    return markdown(["Points24: numbers", "of the solvable deals", "won, %", "first plan right, %",
                     "right plans followed, % of the steps"], rows)


def value_heads():
    """NumberLine with other value heads: how well V explains returns at its best, how answers parse at worst."""
    rows = []
    for folder, text in TRIED.items():
        run = metrics(RESULTS / folder)
        best = max(row["explained_variance"] for row in run)
        worst = [f"{100 * min(row['parse_rate'] for row in part):.1f} %" if part else "–"
                 for part in (run[4:14], run[19:])]
        rows.append([text, folder[-1], str(len(run)), f"{best:.2f}", *worst])
    return markdown(["V on NumberLine", "seed", "updates", "variance explained at best",
                     "answers parsed, worst of updates 5 to 14", "of 20 and later"], rows)


def settings_tried():
    """One setting changed at a time, seed 1: success in training and in held-out games, an answer's entropy."""
    rows = []
    for task in ("points24", "blackjack"):
        found = {"lr 2e-4, temperature 0.5, rank 32": (runs(task, "plain") or runs(task))[:1]}
        found |= {text: runs(task, text.replace(" ", "-")) for text in SEARCH}
        for name, folders in found.items():
            if not folders:
                continue
            run = metrics(folders[0])
            # Minus the mean log-probability of what was sampled is an estimate of the entropy.
            entropy = [-statistics.fmean(row["thought_logp"] + row["action_logp"] for row in part)
                       for part in (run[:1], run[-10:])]
            success = [statistics.fmean(100 * row["success"] for row in part) for part in (run[:3], run[-10:])]
            rows.append([f"{task}: {name}", f"{success[0]:.1f} → {success[1]:.1f}", f"{finals(folders)[0]:.1f}",
                         f"{entropy[0]:.2f} → {entropy[1]:.2f}", f"{100 * min(row['parse_rate'] for row in run):.0f}"])
    return markdown(["one setting changed", "first three → last ten rollouts", "held-out games",
                     "entropy of an answer, nats", "answers parsed, worst rollout, %"], rows)


def speed_choices():
    """What one update takes with each choice for speed undone, or tried, alone: seconds, and times what is done."""
    found = read(RESULTS / "bench" / "speed_ablation.json")["seconds"]
    done = sum(found["as shipped"])
    rows = [[name, f"{playing:.2f}", f"{learning:.2f}", f"{(playing + learning) / done:.2f}"]
            for name, (playing, learning) in found.items()]
    return markdown(["one choice undone or tried", "playing, s", "learning, s", "both, times as shipped"], rows)


def survived():
    """What was tried on run folders and answers (extras/torture.py), how often, and how often it held."""
    file = RESULTS / "bench" / "torture.json"
    if not file.exists():
        return ""
    return markdown(["tried", "times", "held"], [[name, f"{tried:,}", f"{held:,}"]
                                                 for name, (tried, held) in read(file)["tried_held"].items()])


def tables():
    """All of them, without those that no run stands behind yet."""
    makers = (table, references, seeds, families, households, lambdas, trust_regions, best_effort, decisions, plans,
              sampling, experience, value_heads, settings_tried, speed_choices, survived)
    return [text for make in makers if (text := make())]
