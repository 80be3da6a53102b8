"""Draws the figures and prints the tables of the pages, from the JSON files of this folder.

    python results/make.py                  # curves.png, lambda.png, smol.png; the tables

A run is `runs/[smol-]TASK[-VARIANT]-seedN.json`. "a ± b" is the mean over seeds and half of its
95 % interval (Student's t). Imports nothing of the project. Does not handle: making the runs
(run_all.sh), keeping their files (keep.py).
"""

import json
import statistics
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend comes first)

RESULTS = Path(__file__).parent
TASKS = ("numberline", "ezpoints", "points24", "blackjack")
# Exact success in %: the share of solvable deals, the value of Blackjack's best play.
CEILING = {"numberline": 100.0, "ezpoints": 100.0, "points24": 73.1, "blackjack": 43.2}
# The paper's tables, success in %: the four games, then ALFWorld's data set.
PAPER = {
    "SFT, 7B": (24.8, 23.0, 2.6, 23.1, 17.7),
    "RL, 7B": (89.4, 50.0, 2.3, 40.2, 21.7),
    "RL without CoT, 7B": (26.9, 29.9, 0.0, 40.4, 16.3),
    "CNN + RL": (87.1, 0.0, 0.0, 38.8, 0.0),
}
LAMBDAS = ("0", "0.2", "0.5", "0.8", "1")
# starts whose thoughts do not name the action: a name in runs/ → what the figure calls it
UNDECIDED = {
    "numberline-undecided": "numberline, one wording",
    "numberline-undecided-long": "numberline, drawn wordings",
    "ezpoints-undecided": "ezpoints, one wording",
    "ezpoints-undecided-long": "ezpoints, drawn wordings"}
# rows of the table of estimators: a name → a variant in runs/
ESTIMATORS = {
    "GAE": "", "RLOO": "rloo", "GRPO": "grpo",
    "GAE, β 0.01": "kl-0.01", "GAE, β 0.03": "kl-0.03", "GAE, β 0.1": "kl-0.1"}
# Student's t, 97.5 %, of n - 1 degrees of freedom
T = {3: 4.303, 4: 3.182, 5: 2.776}
# The main table: a row's name → a baseline in baselines.json, or else a variant in runs/.
OURS = {
    "SFT start, temperature 0.5": "start",
    "**PPO**": "",
    "PPO without chain of thought": "no-cot",
    "PPO on features, no language model": "features",
    "PPO with self-imitation": "imitation",
    "supervised learning on clean labels of one game": "best-start",
    "uniform random": "random",
    "best constant action": "constant",
    "hit below 12": "below-12",
    "hit below 14": "below-14",
    "best play": "expert",
}
# SmolLM2's table, likewise, of runs/smol-TASK…
SMOL_TASKS = ("numberline", "ezpoints", "blackjack")
SMOL = {
    "SFT start": "start",
    "**PPO**": "",
    "SFT start, without chain of thought": "start-no-cot",
    "PPO without chain of thought": "no-cot",
    "supervised learning on clean labels": "best-start",
    "uniform random": "random",
    "best constant action": "constant",
    "hit below 12": "below-12",
    "best play": "expert",
}
OWN_WORDS = ("success", "expert_agreement", "compare_rate")
HOUSES = {
    "uniform random": "random",
    "search without memory": "heuristic",
    "SFT start": "start",
    "the same without CoT": "start-no-cot",
    "**PPO, λ 0.2**": "",
    "PPO without CoT": "no-cot",
    "PPO, λ 0.5": "lambda-0.5",
}


# ---- reading -------------------------------------------------------------------------------------
def read(path):
    return json.loads(path.read_text())


def runs(task, variant=""):
    """The runs of a task (and a variant, such as "no-cot"), a dict a seed."""
    name = f"{task}-{variant}-seed*.json" if variant else f"{task}-seed*.json"
    return [{"name": path.stem, **read(path)} for path in sorted((RESULTS / "runs").glob(name))]


def finals(chosen, key="success"):
    """In %, of each run's held-out games with its last checkpoint."""
    return [100 * run["eval"][key] for run in chosen]


def baselines():
    return read(RESULTS / "baselines.json")


def baseline(task, name, key="success"):
    """In %, of what RL did not train: random, constant, expert, start, start-no-cot."""
    return 100 * baselines()[f"{task}-{name}"][key]


def shown(values):
    """"mean ± half (n)" of percentages.

    (n) where n is not 3, or all are equal; no ± then, nor below 3; "–" where there is none.

    >>> shown([1.0, 2.0, 3.0]), shown([1.0])
    ('2.0 ± 2.5', '1.0 (1)')
    """
    n = len(values)
    if not values:
        return "–"
    differ = n > 2 and len({*values}) > 1
    spread = f" ± {T[n] * statistics.stdev(values) / n ** 0.5:.1f}" if differ else ""
    count = "" if differ and n == 3 else f" ({n})"
    return f"{statistics.fmean(values):.1f}{spread}{count}"


def curves(chosen):
    """(env steps (U,), success in % (seeds, U)): NaN where no episode ended in a rollout."""
    steps = [row["env_steps"] for row in chosen[0]["metrics"]]
    success = [[row["success"] for row in run["metrics"]] for run in chosen]
    return np.array(steps), 100 * np.array(success, float)


# ---- tables --------------------------------------------------------------------------------------
def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(task, name):
    """Success in % of a baseline where there is one of that name, else of a variant's runs."""
    known = baselines().get(f"{task}-{name}")
    return f"{100 * known['success']:.1f}" if known else shown(finals(runs(task, name)))


def ours():
    """The pocket model on the four games, beside players that do not learn, and SmolLM2."""
    rows = [[text, *(cell(task, name) for task in TASKS)] for text, name in OURS.items()]
    rows[1][1:] = [f"**{value}**" for value in rows[1][1:]]          # the method's own row
    rows.append(["exact ceiling over all deals", *map(str, CEILING.values())])
    for text, name in (("SmolLM2-135M: SFT start", "start"), ("**SmolLM2-135M: PPO**", "")):
        rows.append([text, *(cell(f"smol-{task}", name) for task in TASKS)])
    return markdown(["success, %", *TASKS], rows)


def paper():
    """The paper's own figures, and their average over the four games."""
    rows = [[name, *map(str, row[:4]), f"{statistics.fmean(row[:4]):.1f}", str(row[4])]
            for name, row in PAPER.items()]
    return markdown(["the paper, success, %", *TASKS, "average", "ALFWorld"], rows)


def seeds():
    """Every run of PPO, a game a row, its seeds in turn: success, what answers are like, time."""
    rows = []
    for task in TASKS:
        chosen = runs(task)
        rows.append([task])
        for key in ("success", "parse_rate", "reading_rate", "expert_agreement"):
            after = ", ".join(f"{value:.1f}" for value in finals(chosen, key))
            rows[-1].append(f"{baseline(task, 'start', key):.1f} → {after}")
        rows[-1].append(", ".join(f"{run.get('wall_s', np.nan) / 60:.0f}" for run in chosen))
    return markdown(["seeds 1, 2, …: before → after RL", "success, %", "named a legal action, %",
                     "read the picture, %", "played as the expert, %", "minutes"], rows)


def steps_to(run, share=0.9):
    """Environment steps until a rollout first wins such a share of its games; None: none does."""
    won = (row["env_steps"] for row in run["metrics"] if (row["success"] or 0) >= share)
    return next(won, None)


def mean_steps(chosen):
    """Of those runs that get there: "2,560", or "2,560 (2 of 3)"."""
    found = [steps for run in chosen if (steps := steps_to(run))]
    if not found:
        return "–"
    some = f" ({len(found)} of {len(chosen)})" if len(found) < len(chosen) else ""
    return f"{statistics.fmean(found):,.0f}{some}"


def each(chosen, key):
    """Of each run: success of held-out games, the summed KL, or −log π in the last rollout."""
    if key == "success":
        return finals(chosen)
    if key == "answer_kl":
        return [sum(row[key] for row in run["metrics"]) for run in chosen]
    return [-run["metrics"][-1][key] for run in chosen]


def over_runs(chosen, key):
    return f"{statistics.fmean(each(chosen, key)):.2f}"


def undecided(name):
    """RL where the thoughts do not name the action, by λ: three seeds each.

    Entropy of an answer's parts by what was sampled, E[−log π], in the last rollout; the KL is that
    of whole answers in an update, λ = 1, summed over the run.
    """
    head = [f"{name}, λ", "success, %", "steps to 90 %", "read, %", "entropy of thoughts",
            "of actions", "KL, summed", "updates cut short"]
    rows = []
    if start := baselines().get(f"{name}-start"):
        read_right = f"{100 * start['reading_rate']:.1f}"
        rows.append(["start", f"{100 * start['success']:.1f}", "–", read_right, *4 * ["–"]])
    for weight in LAMBDAS:
        if not (chosen := runs(name, f"lambda-{weight}")):
            continue
        cut = [sum(row["minibatches"] < 16 for row in run["metrics"]) for run in chosen]
        read_right = shown(finals(chosen, "reading_rate"))
        rows.append([
            weight, shown(finals(chosen)), mean_steps(chosen), read_right,
            *(over_runs(chosen, key) for key in ("thought_logp", "action_logp", "answer_kl")),
            f"{statistics.fmean(cut):.1f}"])
    return markdown(head, rows)


def estimators():
    """Advantages by V, by a deal's other episodes, and thoughts held to the start, a row each."""
    rows = []
    for task in ("numberline", "ezpoints", "blackjack"):
        if not runs(task, "rloo"):
            continue
        for text, variant in ESTIMATORS.items():
            if chosen := runs(task, variant):
                rows.append([
                    f"{task}: {text}", shown(finals(chosen)), mean_steps(chosen),
                    shown(finals(chosen, "parse_rate")), shown(finals(chosen, "reading_rate")),
                    over_runs(chosen, "thought_logp")])
    return markdown(["advantages", "success, %", "steps to 90 %", "parsed, %", "read, %",
                     "entropy of thoughts"], rows)


def looks():
    """Runs shown their pictures, black ones, and another deal's."""
    rows = []
    for name, variant in (("numberline", ""), ("alfworld", ""),
                          ("alfworld, the picture alone tells", "untold")):
        task = name.split(",")[0]
        if not (chosen := runs(task, variant)):
            continue
        seen = [finals(chosen)]
        for shown_instead in ("black", "another"):
            keys = [f"{run['name']}-{shown_instead}" for run in chosen]
            seen.append([100 * baselines()[key]["success"] for key in keys if key in baselines()])
        before = cell(task, "-".join(filter(None, (variant, "start"))))
        rows.append([name, before, *map(shown, seen)])
    return markdown(["shown, success, %", "before RL: the picture", "after RL: the picture",
                     "a black one", "another deal's"], rows)


def withheld():
    """What RL without some deals comes to on those it saw and on the others, exactly."""
    rows = []
    for task in ("numberline", "ezpoints", "points24"):
        before, chosen = baselines().get(f"{task}-withheld-start"), runs(task, "withheld")
        if not before or not chosen:
            continue
        cells = []
        for kind in ("seen", "withheld"):
            after = [100 * run["eval"]["success_by_kind"][kind] for run in chosen]
            cells.append(f"{100 * before['success_by_kind'][kind]:.1f} → {shown(after)}")
        rows.append([task, *cells])
    return markdown(["before → after RL, %", "deals that RL saw", "deals withheld from it"], rows)


def temperatures():
    """Points24 and Blackjack at lower temperatures, in training and evaluation alike."""
    rows = []
    for temperature in ("0.5", "0.2", "0.1"):
        own = "" if temperature == "0.5" else f"temperature-{temperature}"      # 0.5 is the default
        cells = []
        for task in ("points24", "blackjack"):
            before = cell(task, "-".join(filter(None, ("start", own))))
            after = cell(task, own)
            cells.append("–" if after == "–" else f"{before} → {after}")
        rows.append([temperature, *cells])
    return markdown(["temperature: before → after RL, %", "points24", "blackjack"], rows)


def behaviour(task, names, keys):
    """A row a player, named as in OURS: its evaluations under these keys, in %, mean over seeds."""
    rows = []
    for text, name in names.items():
        known = baselines().get(f"{task}-{name}")
        results = [known] if known else [run["eval"] for run in runs(task, name)]
        if not results:     # not run yet
            continue
        # in % before the mean, as `finals`: or a mean may be rounded the other way
        means = (statistics.fmean(100 * result[key] for result in results) for key in keys)
        rows.append([f"{task}: {text}", *(f"{mean:.1f}" for mean in means)])
    return rows


def decisions(task):
    """How often each player of Blackjack hits, by total: what the average does not show."""
    names = {"best play": "expert", "hit below 12": "below-12", "SFT start": "start",
             "**PPO**": "", "PPO without chain of thought": "no-cot"}
    keys = ("hit_rate_to_11", "hit_rate_12_to_16", "hit_rate_from_17", "success")
    return markdown([f"{task}: hits, %", "on 4 to 11", "on 12 to 16", "on 17 to 21", "wins, %"],
                    behaviour(task, names, keys))


def plans():
    """How often a formula game's written plan is right and is followed, and what that wins."""
    keys = ("plan_rate", "plan_followed", "success")
    learned = {"SFT start": "start", "**PPO**": ""}
    others = {"SFT start, temperature 0.2": "start-temperature-0.2",
              "SFT start, temperature 0.1": "start-temperature-0.1",
              "PPO with self-imitation": "imitation"}
    rows = behaviour("ezpoints", learned, keys) + behaviour("points24", learned | others, keys)
    return markdown(["formula games, %", "plan right while a solution is in reach",
                     "next symbol follows the plan", "success"], rows)


def households():
    """ALFWorld in small houses: success in 500 held-out houses."""
    cells = [cell("alfworld", name) for name in HOUSES.values()]
    return markdown(["ALFWorld, %", *HOUSES], [["held-out houses", *cells]])


def smol():
    """SmolLM2 in a LLaVA, on the games that it was taught, beside players on the same deals."""
    rows = [[text, *(cell(f"smol-{task}", name) for task in SMOL_TASKS)]
            for text, name in SMOL.items()]
    rows = [row for row in rows if {*row[1:]} != {"–"}]
    return markdown(["SmolLM2-135M, success, %", *SMOL_TASKS], rows)


def ends(run, key, form):
    """Of the first and the last rollout, as "0.56 → 0.00"; of log-probabilities −log π."""
    return " → ".join(f"{abs(run['metrics'][index][key]):{form}}" for index in (0, -1))


def smol_runs():
    """SmolLM2's runs, one by one: their held-out games, then answers in rollouts, first → last.

    Entropy, of an answer's part in nats, by what was sampled: E[−log π].
    """
    rows = []
    for path in sorted((RESULTS / "runs").glob("smol-*.json")):
        if path.stem.startswith("smol-ownwords"):
            continue
        run = read(path)
        rates = [f"{100 * run['eval'][key]:.1f}" if run["eval"].get(key) is not None else "–"
                 for key in ("success", "parse_rate", "reading_rate")]
        thoughts = ends(run, "thought_logp", ".3f") if run["config"]["cot"] else "–"
        rows.append([path.stem.removeprefix("smol-"), *rates, thoughts,
                     ends(run, "action_logp", ".3f"), f"{run['wall_s'] / 60:.0f}"])
    return markdown(["run", "success, %", "parsed, %", "read, %", "entropy of thoughts",
                     "of actions", "minutes"], rows)


def own_words():
    """SmolLM2's start whose thoughts have many wordings, and RL from it, by λ.

    Minibatches: those that were come to before the limit on the KL ended their update, of all.
    """
    rows = []
    if start := baselines().get("smol-ownwords-start"):
        rows.append(["SFT start", *(f"{100 * start[key]:.1f}" for key in OWN_WORDS), *4 * ["–"]])
    for path in sorted((RESULTS / "runs").glob("smol-ownwords-*.json")):
        run = read(path)
        config, updates = run["config"], run["metrics"]
        planned = config["total_timesteps"] // config["minibatch_size"] * config["update_epochs"]
        rates = [f"{100 * run['eval'][key]:.1f}" for key in OWN_WORDS]
        rows.append([f"{config['cot_lambda']:g}", *rates,
                     ends(run, "thought_logp", ".2f"), ends(run, "action_logp", ".2f"),
                     ends(run, "response_tokens", ".1f"),
                     f"{sum(row['minibatches'] for row in updates)} of {planned}"])
    return markdown(["own words, λ", "success, %", "moves right, %", "compared rightly, %",
                     "entropy of thoughts", "of actions", "tokens", "minibatches"], rows)


def tables():
    """All tables that pages show, but for YOUR_OWN_GAME.md's, and LOG.md's, which are history."""
    found = [
        ours(), paper(), seeds(), looks(), decisions("blackjack"), plans(), households(),
        estimators(), withheld(), temperatures(),
        smol(), smol_runs(), decisions("smol-blackjack"), own_words()]
    found += [undecided(name) for name in UNDECIDED]
    # a head and a line alone: its runs are still to be made
    return [table for table in found if len(table.splitlines()) > 2]


# ---- figures -------------------------------------------------------------------------------------
def draw_curves(file, prefix=""):
    """A panel a game: success while it learns, mean and range of seeds; dots: held-out games.

    prefix: of the runs' names, such as "smol-".
    """
    tasks = [task for task in TASKS if runs(prefix + task)]
    figure, [panels] = pyplot.subplots(
        1, len(tasks), figsize=(3.5 * len(tasks), 3.8), squeeze=False)
    for axes, task in zip(panels, tasks):
        for variant, start, label, color in (
                ("", "start", "PPO", "tab:blue"),
                ("no-cot", "start-no-cot", "PPO without CoT", "tab:red")):
            chosen = runs(prefix + task, variant)
            if not chosen:
                continue
            steps, success = curves(chosen)
            axes.plot(steps, np.nanmean(success, 0), color=color, label=label)
            axes.fill_between(steps, np.nanmin(success, 0), np.nanmax(success, 0), color=color,
                              alpha=0.2, linewidth=0)
            if f"{prefix}{task}-{start}" in baselines():
                axes.plot(0, baseline(prefix + task, start), "o", color=color, markersize=4)
            axes.plot([steps[-1]] * len(chosen), finals(chosen), "o", color=color, markersize=4)
        axes.axhline(CEILING[task], linestyle="--", color="black", label="exact ceiling")
        chance = baseline(prefix + task, "random")
        axes.axhline(chance, linestyle="--", color="gray", label="uniform random")
        axes.set(title=task, xlabel="environment steps", ylim=(-2, 104))
    panels[0].set_ylabel("success, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(RESULTS / file, dpi=110, bbox_inches="tight")     # or it is cut
    pyplot.close(figure)


def draw_lambda(file):
    """A column a start of `undecided`, over λ: success, entropies of the last rollout, summed KL.

    Dots are seeds, lines their means. Gray: the λ with which the paper's NumberLine learned, 0.2 to
    0.5; with 0.1 and less and with 0.7 and more it did not leave its start.
    """
    names = [name for name in UNDECIDED if runs(name, "lambda-0")]
    if not names:       # its runs are still to be made
        return
    figure, grid = pyplot.subplots(
        3, len(names), figsize=(3.5 * len(names), 7.5), sharex=True, sharey="row", squeeze=False)
    kinds = (("success", "success, %"), ("thought_logp", "thoughts"), ("action_logp", "action"),
             ("answer_kl", "KL to the rollout's policy, summed"))
    for column, name in zip(grid.T, names):
        column[0].set(title=UNDECIDED[name], ylim=(-2, 104))
        for axes in column:
            axes.axvspan(0.2, 0.5, color="gray", alpha=0.15, linewidth=0)
        for (key, label), axes in zip(kinds, column[[0, 1, 1, 2]]):
            found = {float(weight): each(chosen, key) for weight in LAMBDAS
                     if (chosen := runs(name, f"lambda-{weight}"))}
            [line] = axes.plot([*found], [*map(statistics.fmean, found.values())], label=label)
            for weight, values in found.items():
                axes.plot([weight] * len(values), values, "o", color=line.get_color(),
                          markersize=4)
        # of a sum a single answer may be most
        column[2].set(xlabel="λ", yscale="log")
    grid[0, 0].set_ylabel("success, %")
    grid[1, 0].set_ylabel("entropy, nats an answer")
    grid[2, 0].set_ylabel("KL of whole answers, nats")
    grid[1, 0].legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(RESULTS / file, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def main():
    draw_curves("curves.png")
    draw_lambda("lambda.png")
    if runs("smol-numberline"):
        draw_curves("smol.png", "smol-")
    print(*tables(), sep="\n\n")


if __name__ == "__main__":
    main()
