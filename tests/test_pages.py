"""The pages: figures, tables, commands, links, the tutorial."""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import parse
import ppo
import rollout as playing
import sft
from env import GAMES, TASKS, find_game
from plumbing import flags, manifest
from plumbing.settings import Settings
from policy import Policy
from tests.common import pocket_settings

HERE = Path(__file__).parent.parent
PAGES = ("README.md", "DIFFERENCES.md", "results/README.md", "results/LOG.md", "extras/README.md", "lab/README.md",
         "YOUR_OWN_GAME.md", "results/SMOL.md", "results/LAMBDA.md", "results/ESTIMATORS.md")


def script_of(file):
    """A module that is no part of a package."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, HERE / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make():
    return script_of("results/make.py")


def read(page):
    return (HERE / page).read_text(encoding="utf-8")


# ---- the tutorial ------------------------------------------------------------------------------
TUTORIAL = HERE / "tutorial.ipynb"
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}        # a kernel writes its version and more into it


def execute(folder):
    """The notebook (nbformat's), executed in a kernel of its own on one thread; raises what a cell raises. To store it
    after a change of it, from the repository's root:

        python -c "import nbformat, tests.test_pages as t; nbformat.write(t.execute('/tmp/kernel'), t.TUTORIAL)"
    """
    import nbformat
    from nbclient import NotebookClient
    notebook = nbformat.read(TUTORIAL, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True,
                            extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": str(HERE)}})
    env = os.environ | {"IPYTHONDIR": str(folder), "OMP_NUM_THREADS": "1"}      # nobody's own start-up files
    env.pop("MPLBACKEND", None)
    client.execute(env=env)
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def tutorial_cells():
    return [cell for cell in json.loads(TUTORIAL.read_text())["cells"] if cell["cell_type"] == "code"]


def shown(cell):
    """All that a cell printed, and the text/plain of what it displayed, without the pictures."""
    printed = "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
    return printed + "".join("".join(out["data"]["text/plain"]) for out in cell["outputs"] if "data" in out)


def test_the_tutorial_is_stored_with_its_outputs_and_nothing_of_its_machine():
    notebook = json.loads(TUTORIAL.read_text())
    assert TUTORIAL.stat().st_size < 400_000
    assert notebook["metadata"] == METADATA
    assert all(set(cell["metadata"]) <= {"tags"} for cell in notebook["cells"])         # such as times of execution
    assert [cell["execution_count"] for cell in tutorial_cells()] == [*range(1, len(tutorial_cells()) + 1)]
    for cell in tutorial_cells():
        kinds = [output.get("name", output["output_type"]) for output in cell["outputs"]]
        pictures = sum("image/png" in output.get("data", ()) for output in cell["outputs"])
        source = "".join(cell["source"])
        assert set(kinds) <= {"stdout", "display_data", "execute_result"}, cell["id"]   # no warnings, no progress bars
        assert ("stdout" in kinds) == ("print(" in source), cell["id"]
        assert pictures == len(re.findall(r"subplots\(|Image\.fromarray", source)), cell["id"]
        assert not re.search(r"/(work|root|home|opt|tmp|Users)\b|0x[0-9a-f]{6}", shown(cell)), cell["id"]


def test_the_tutorial_runs_and_shows_what_is_stored(tmp_path):
    """Word for word. Decimals may differ in the last place; after learning, which adds up rounding, by 0.1."""
    for package in ("nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason="pip install -r extras/requirements-notebook.txt")
    notebook = execute(tmp_path)
    decimal = r"-?\d+\.\d+"
    fresh = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for stored, now in zip(tutorial_cells(), fresh, strict=True):
        expected, found = shown(stored), shown(now)
        assert re.sub(rf" *{decimal}", " #", found) == re.sub(rf" *{decimal}", " #", expected), now.id
        figures = [[float(figure) for figure in re.findall(decimal, text)] for text in (found, expected)]
        slack = 0.1 if "learns" in now.metadata.get("tags", ()) else 0.011
        assert figures[0] == pytest.approx(figures[1], abs=slack, rel=0), now.id


# ---- the README --------------------------------------------------------------------------------
def test_the_readme_is_short_and_no_page_has_a_placeholder_left():
    assert len(read("README.md").splitlines()) <= 170
    for page in PAGES:
        assert not re.search(r"^(QUICKSTART|TABLE_\w+)$|TODO|XXX", read(page), re.M), page


def test_the_readmes_worked_step_is_true(shipped):
    """The answer that the snippet samples, and the figures that the method section gives for it."""
    agent, game = Policy(shipped[0], shipped[1], target_modules=(), temperature=0.5), GAMES["blackjack"]()
    picture, info = game.reset(seed=0)
    [prompt], [response], [choice] = playing.act(agent, [game], [picture], [info], torch.Generator().manual_seed(0),
                                                 np.random.default_rng(0))
    with torch.no_grad():
        logp, _ = agent.logprobs([prompt], [response])
    start, pictured = choice.action_start, prompt.ids.count(agent.family.image_token)
    action, character = parse.parse(choice.text, game.legal_actions())
    weighted = ppo.answer_logprob(logp, torch.tensor([start]), 0.5).item()
    readme = read("README.md")
    for told in (f"picture {picture.shape}",
                 f"dealer {info['dealer']}, hand {' '.join(info['hand'])}, total {info['total']}",
                 f"{len(prompt.ids)} tokens: {pictured} picture, {len(prompt.ids) - pictured} text",
                 f"{len(response)} sampled tokens", choice.text, f'"{action}"; the action part begins at character '
                 f"{character}, token {start}"):
        assert told in readme
    figures = (logp[0, :start].sum().item(), logp[0, start:].sum().item(), weighted)
    assert all(f"{figure:.3f}".replace("-", "−") in readme for figure in figures), figures


def test_the_readmes_snippet_plays_and_scores_one_step(monkeypatch):
    """The Python block runs as it stands, and prints what the comment at its end says."""
    block = re.search(r"```python\n(.*?)```", read("extras/README.md"), re.S)[1]
    monkeypatch.chdir(HERE)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(block, "extras/README.md", "exec"), {"__name__": "__main__"})
    found = said.getvalue().splitlines()
    assert len(found) == 3
    for line in found:
        assert line.removeprefix("{") in block.split("# {")[1], line


@pytest.mark.parametrize("task", TASKS)
def test_ppo_is_the_default_of_every_game(task):
    """Self-imitation is for those who ask."""
    settings = pocket_settings(task)
    assert (settings.imitation, settings.temperature) == (0, 0.5)


def test_the_readme_tells_the_settings_that_are_not_the_papers():
    """Its table has the defaults of plumbing/settings.py, of a large model and of the pocket model."""
    large, pocket = Settings(task="blackjack"), pocket_settings("blackjack")
    rows = [line.strip("| ").split(" | ") for line in read("README.md").splitlines() if line.startswith("| ")]
    told = {row[0]: [re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", cell) for cell in row[1:3]] for row in rows}
    plain = {name: [[*map(float, cell)] for cell in cells] for name, cells in told.items()}
    assert plain["temperature"] == [[large.temperature], [pocket.temperature]]
    assert plain["LoRA rank"] == [[large.rank], [pocket.rank]]
    assert plain["learning rate; of the value head"] == [[large.lr], [pocket.lr, pocket.value_lr]]
    assert large.value_lr == large.lr
    assert plain["advantages are divided by"] == [[], [pocket.advantage_floor]] and large.advantage_floor == 0
    assert plain["the policy's update ends"] == [[large.update_epochs], [pocket.target_kl]] and large.target_kl == 0


# ---- tables and figures ------------------------------------------------------------------------
def stands_on(table):
    """The pages that have a Markdown table, each as often as it has it; wherever its head is, all of it must be."""
    rows, found = table.splitlines(), []
    for page in PAGES:
        lines = [line.strip() for line in read(page).splitlines()]
        for first in (k for k, line in enumerate(lines) if line == rows[0]):
            assert lines[first:first + len(rows)] == rows, page
            assert not lines[first + len(rows)].startswith("|"), page       # no row of an earlier table is left
            found.append(page)
    return found


def test_the_readmes_tables_are_made_of_the_result_files(make):
    tables = make.tables()
    assert len(tables) >= 5 and {make.ours(), make.paper()} <= set(tables)
    for table in tables:
        assert len(table.splitlines()) >= 3 and stands_on(table), table
    assert "README.md" in stands_on(make.ours()) and "README.md" in stands_on(make.paper())
    tried = json.loads(read("results/bench/torture.json"))["tried_held"]
    survived = [[name, *(f"{count:,}" for count in counts)] for name, counts in tried.items()]
    assert stands_on(make.markdown(["tried", "times", "held"], survived)) == ["lab/README.md"]


def table_of_own_games(make):
    """RL on the games of YOUR_OWN_GAME.md, three seeds each, beside players on the same deals."""
    games = {"GridWorld": "gridworld", "FrozenLake, dry": "frozenlake-dry", "FrozenLake, slippery": "frozenlake-slippery"}
    players = {"uniform random": "random", "before RL": "start", "**PPO**": "", "exact policy": "expert"}
    rows = [[text, *(make.cell(game, player) for game in games.values())] for text, player in players.items()]
    return make.markdown(["success, %", *games], rows)


def test_the_table_of_ones_own_games_is_made_of_the_result_files(make):
    assert stands_on(table_of_own_games(make)) == ["YOUR_OWN_GAME.md"]


def test_the_quick_start_prints_what_its_result_file_says():
    found = json.loads(read("results/bench/quick-start.json"))
    for name, key in (("start", "eval_start"), ("end", "eval")):
        result = found[key]
        success, low, high, parsed, seen = (100 * result[part] for part in (
            "success", "success_low", "success_high", "parse_rate", "reading_rate"))
        line = (f"{name}: success {success:.1f} % ({low:.1f} to {high:.1f}), return {result['return_mean']:.3f}, "
                f"answers parsed {parsed:.1f} %, pictures read {seen:.1f} %")
        assert line in read("README.md").splitlines()


def test_the_table_of_gpus_is_made_of_the_plans_of_memory():
    shapes = importlib.import_module("lab.shapes")
    assert stands_on(shapes.table()) == ["lab/README.md"]


def test_figures_draw_what_the_files_say(make, monkeypatch):
    """Means of the seeds in %; a rollout in which no episode ended is a gap."""
    rows = [{"env_steps": 8 * k, "success": success} for k, success in enumerate((0.5, None, 1.0))]
    steps, success = make.curves([{"metrics": rows}])
    assert steps.tolist() == [0, 8, 16] and np.array_equal(success, [[50, np.nan, 100]], equal_nan=True)
    drawn = {}
    monkeypatch.setattr(make.pyplot.Figure, "savefig", lambda figure, path, **_: drawn.update({path.name: figure}))
    make.draw_curves("curves.png")
    for axes, task in zip(drawn["curves.png"].axes, make.TASKS, strict=True):
        ppo, no_cot = (line for line in axes.lines if line.get_label().startswith("PPO"))
        for line, variant in ((ppo, ""), (no_cot, "no-cot")):
            assert np.allclose(line.get_ydata(), np.nanmean(make.curves(make.runs(task, variant))[1], 0))


def test_figures_in_the_prose_are_in_the_result_files(make):
    """Games without a first success, what the starts that were taught one came to, what the README's sentences say."""
    prose = " ".join(" ".join(read(page).split()) for page in PAGES)

    def games(task, variant):
        rows = [row for run in make.runs(task, variant) for row in run["metrics"]]
        return sum(round(row["episodes"] * row["success"]) for row in rows), sum(row["episodes"] for row in rows)

    for task, variant in (("points24", "no-cot"), ("ezpoints", "features"), ("points24", "features")):
        won, played = games(task, variant)
        assert re.search(rf"(?<![\d.,]){won} of {played:,}", prose), (task, variant)
    tried = HERE / "results" / "tried"
    taught = [json.loads(file.read_text()) for file in sorted(tried.glob("taught-points24-no-cot-seed*.json"))]
    assert len(taught) == 3 and f"to {make.shown(make.finals(taught))} %" in prose
    features = json.loads((tried / "taught-features-ezpoints-seed1.json").read_text())
    for run, keys in ((taught[0], ("eval_start",)), (features, ("eval_start", "eval"))):
        for key in keys:
            assert re.search(rf"(?<![\d.,]){100 * run[key]['success']:.1f} %", prose), key
    shares = {key: make.baseline(*key) for key in (
        ("blackjack", "below-14"), ("points24", "start-temperature-0.2"), ("points24", "start-temperature-0.1"),
        ("ezpoints", "before-weakening"), ("points24", "before-weakening"))}
    for key, share in shares.items():
        assert re.search(rf"(?<![\d.,]){share:.1f} %", prose), key
    [ended] = {*make.finals(make.runs("numberline", "lambda-0"))}
    assert ended == make.baseline("numberline", "start") and f"end where they began, at {ended:.1f} %" in prose
    blind = [f"{np.mean([make.baseline('numberline', f'seed{seed}-{seen}') for seed in range(1, 6)]):.1f} %"
             for seen in ("black", "another")]
    assert f"black pictures it wins {blind[0]} of NumberLine, as a constant move does, shown another deal's {blind[1]}" in prose
    few_games = [json.loads(file.read_text()) for file in sorted(tried.glob("points24-temperature-0.1-envs-32-seed[123].json"))]
    long = json.loads((tried / "points24-temperature-0.1-envs-32-60000-steps-seed7.json").read_text())
    assert f"three seeds win {make.shown(make.finals(few_games))} %, and with 60,000 steps as well, instead of 15,000, " \
           f"one wins {make.finals([long])[0]:.1f} %" in prose
    fallen = min(make.runs("numberline", "grpo"), key=lambda run: run["eval"]["parse_rate"])
    worst = 100 * min(row["parse_rate"] for row in fallen["metrics"])
    assert f"There {worst:.0f} % of the answers name an action in the worst rollout, and " \
           f"{100 * fallen['eval']['parse_rate']:.0f} % at the end" in prose
    states = [run["states"] for run in json.loads((tried / "numberline-withheld-decisions.json").read_text())["runs"]]
    answers = sum(state["answers"] for run in states for state in run)
    assert sum(state["compared rightly"] for run in states for state in run) == answers - 1
    back = [f"{100 - 100 * at_2['moved rightly'] / at_2['answers']:.0f}" for _, _, at_2, _, _ in states]
    assert f"Of {answers:,} answers where the target is 3" in prose
    assert f"{', '.join(back[:-1])} and {back[-1]} % of them go on with" in prose
    assert f"wins {make.baseline('alfworld', 'start'):.0f} % before RL and " \
           f"{make.shown(make.finals(make.runs('alfworld')))} % after it" in prose


def test_what_the_page_on_smollm2_says_beside_its_runs_is_in_the_result_files(make):
    """Tables of lessons and of hits; what its sentences say of the start, of times, of what was tried."""
    prose = " ".join(read("results/SMOL.md").split())
    stored = lambda name: json.loads(read(f"results/{name}.json"))
    hits = stored("tried/smol-blackjack-hits")["players"]
    totals = ["4 to 11", "12 to 16", "17 to 21"]
    rows = [[row["player"], *(f"{row[key][0]:.0f}" for key in totals)] for row in hits]
    rows = [row for row in rows if f"| {row[0]} |" in read("results/SMOL.md")]
    assert len(rows) == len(hits) - 6       # as the page says
    assert stands_on(make.markdown(["P(hit), %", *(f"on {key}" for key in totals)], rows)) == ["results/SMOL.md"]

    players = stored("tried/smol-ownwords-samples")["players"]
    rows = [[f'"{end}"', *(f"{found['answers']} ({found['true, %']}, {found['acted on, %']})" if found["answers"] else "0"
                           for found in (player["endings"][end] for player in players))] for end in players[0]["endings"]]
    head = ["answers (true, acted on, %)", *(player["player"] for player in players)]
    assert stands_on(make.markdown(head, rows)) == ["results/SMOL.md"]

    runs = [json.loads(file.read_text()) for file in (HERE / "results" / "runs").glob("smol-*.json")]
    assert {row["ratio_error"] for run in runs for row in run["metrics"]} == {0}
    build, attention = stored("bench/smol-build"), stored("bench/smol-attention")
    whole, half = (stored(f"bench/smol-{bits}-bits")["whole_update_s"] for bits in (32, 16))
    layer, batch = (attention[key] for key in attention if "last two of four" in key or "one layer" in key)
    fused = layer["torch's fused (sdpa), 3 key heads"][1]
    start = {task: make.baselines()[f"smol-{task}-start"] for task in ("numberline", "ezpoints", "blackjack")}
    assert {found["parse_rate"] for found in start.values()} == {1}
    assert start["numberline"]["reading_rate"] == start["ezpoints"]["reading_rate"] == 1
    rose = stored("tried/smol-numberline-lr-2e-4-seed1")["metrics"]
    (few, many), (few_learned, many_learned) = (
        (player["two cards"], player["three or more cards"]) for player in stored("tried/smol-blackjack-totals")["players"])
    middling = [f"{100 * cards['hits on 12 to 16'][1]:.0f}" for cards in (many_learned, many, few_learned, few)]
    assert few["total right"] == 1 and round(many["decisions"] / (few["decisions"] + many["decisions"]), 2) == 0.34
    stood, players = stored("tried/smol-blackjack-lr-1e-4-seed1")["eval"], stored("tried/smol-blackjack-starts")["players"]
    won = {player["policy"]: 100 * player["success"] for player in players}
    again = stored("tried/smol-blackjack-starts")["start E made again on a second machine, by the same commands"]
    first = again["first rollout of seed 1, log-probability of the thoughts"]
    assert first["on file"] == make.runs("smol-blackjack")[0]["metrics"][0]["thought_logp"]
    [clean] = [100 * taught["eval"]["success"] for taught in stored("tried/smol-blackjack-starts")["starts"]
               if "--steps 150" in taught["command"]]
    assert won["always:stand"] == 100 * stood["success"]
    fast = stored("tried/smol-blackjack-noise-0.3-lr-4e-4-seed1")["metrics"]
    learned = [run["eval"] for run in make.runs("smol-blackjack")]
    [formulas] = [run["eval"] for run in make.runs("smol-ezpoints")]
    assert formulas["success"] == formulas["plan_rate"] == 1
    listed = lambda shares: "{}, {} and {} %".format(*(f"{100 * share:.0f}" for share in shares))
    hit = {total: listed(seed["hit_rate_by_total"][total] for seed in learned) for total in ("11", "12", "21")}
    low, middle = (listed(seed[key] for seed in learned) for key in ("hit_rate_to_11", "hit_rate_12_to_16"))
    assert {seed["hit_rate_by_total"]["4"] for seed in learned} == {1}
    [cool] = make.runs("smol-numberline", "short-temperature-0.2")
    [four], [sixteen] = (make.runs("smol-numberline", f"short-bits-{bits}") for bits in (4, 16))
    wins = [[f"{100 * row['success']:.0f}" for row in run["metrics"]] for run in (four, sixteen)]
    of_four, of_sixteen = (f"{', '.join(share[:-1])} and {share[-1]}" for share in wins)
    games = [row["episodes"] for run in (four, sixteen) for row in run["metrics"]]
    apart = []
    for one, other in zip(four["metrics"], sixteen["metrics"]):
        n, m = one["episodes"], other["episodes"]
        share = (n * one["success"] + m * other["success"]) / (n + m)      # of both, as where they are alike
        apart.append(abs(one["success"] - other["success"]) / (share * (1 - share) * (1 / n + 1 / m)) ** 0.5)
    silent, rates = make.baselines()["smol-blackjack-start-no-cot"], ("hit_rate_to_11", "hit_rate_12_to_16", "hit_rate_from_17")
    silent = "{:.0f}, {:.0f} and {:.0f} % on the three".format(*(100 * silent[rate] for rate in rates))
    [stands] = make.runs("smol-blackjack", "no-cot")
    assert stands["eval"]["success"] == make.baselines()["smol-blackjack-constant"]["success"]
    entropies = "entropy fell from {:.2f} to {:.3f}".format(*(-stands["metrics"][update]["action_logp"] for update in (0, 3)))
    for said in (
            f"{build['wall_s'] / 60:.0f} minutes on two cores",
            f"takes {half:.0f} s on two cores, in 32 bits {whole:.0f}",
            f"{fused:.0f} ms for 16 answers and one layer",
            f"takes {sum(map(sum, batch['eager'])) / 2:.1f} s, not {sum(map(sum, batch['sdpa'])) / 2:.1f}",
            f"{100 * start['ezpoints']['plan_rate']:.1f} % of the plans are right where one could be, and "
            f"{100 * start['ezpoints']['plan_followed']:.0f} % of the answers",
            f"{100 * start['ezpoints']['plan_followed']:.0f} → {100 * formulas['plan_followed']:.0f} % of the answers do",
            f"the eight rollouts win {of_four} % of their games, in 16 bits {of_sixteen}",
            f"They have {min(games)} to {max(games)} games each, and no two differ by more than {max(apart):.1f} standard errors",
            f"Held out it wins {100 * four['eval']['success']:.1f} % of 200 games",
            f"NumberLine comes to {100 * cool['eval']['success']:.1f} % in {len(cool['metrics'])} updates",
            f"from {make.baseline('smol-numberline', 'start-temperature-0.2'):.1f} at that temperature",
            f"gives its thoughts −{-first['made again']:.3f}, not −{-first['on file']:.3f}",
            f"This start wins {100 * again['1,000 held-out games']['success']:.1f} % of the held-out games, not "
            f"{100 * start['blackjack']['success']:.1f}",
            f"this start hits {silent}", entropies, f"One answer of {formulas['steps']} named no legal",
            f"In its tenth update {100 * rose[9]['success']:.0f} % of the games that ended were won, in its fourteenth "
            f"{100 * rose[13]['success']:.0f} %", f"from 100 to {100 * rose[13]['reading_rate']:.0f} %",
            f"hitting below 12 wins {won['below:12']:.1f} and best play {won['expert']:.1f}",
            f"read right in {100 * fast[2]['reading_rate']:.0f} of 100 answers after two updates",
            f"They hit all 4s, {hit['11']} of 11s, {hit['12']} of 12s, {hit['21']} of 21s",
            f"({low}, from {100 * start['blackjack']['hit_rate_to_11']:.0f})", f"hit too seldom ({middle})",
            f"start D wins {clean:.1f} % of those",
            f"and {100 * many['total right']:.0f} % of those of three or more cards",
            f"seed 1 has {100 * many_learned['total right']:.0f} %",
            "it hits in {} %, the start in {}; on two cards in {}, the start in {}".format(*middling),
            f"Blackjack's start reads {100 * start['blackjack']['reading_rate']:.1f} %",
            f"Of {stood['episodes']} deals it wins {100 * stood['success']:.1f} %, as always standing does"):
        assert said in prose, said


# ---- runs and their commands -------------------------------------------------------------------
PARSERS = {
    "train.py": lambda: flags.make_parser(Settings),
    "sft.py": lambda: flags.make_parser(sft.SFTSettings),
    "eval.py": evaluation.make_parser,
    "results/keep.py": lambda: script_of("results/keep.py").make_parser(),
    "-m lab.features": lambda: flags.make_parser(importlib.import_module("lab.features").FeatureSettings),
    "-m lab.shapes": argparse.ArgumentParser, "results/make.py": argparse.ArgumentParser} | {      # which take nothing
    f"-m lab.{name}": lambda: importlib.import_module("lab.pocket").bare_parser("") for name in ("pocket_alfworld", "smol")} | {
    f"-m lab.{name}": lambda name=name: importlib.import_module(f"lab.{name}").make_parser()
    for name in ("pocket", "bench", "torture", "rehearsal")}


def test_each_result_belongs_to_its_command(make):
    """A run's settings, held-out games and name are what its command says: all steps, held-out deals."""
    files = sorted((HERE / "results" / "runs").glob("*.json"))
    assert len(files) >= 80 and make.runs("alfworld")       # none is hidden from git
    for file in files:
        run, name = json.loads(file.read_text()), file.stem
        command = run["command"].replace("-m extras.features", "-m lab.features")
        command = re.sub(r" --negative-weight 1(?= )| --temperature-end 0.5(?= )", "", command)     # gone; these: no effect
        script, words = re.match(r"OMP_NUM_THREADS=1 python (\S+\.py|-m \S+) (.*)", command).groups()
        given = vars(PARSERS[script]().parse_args(shlex.split(words)))
        config, end = run["config"], run["eval"]
        assert Path(given["out"]).name == Path(config["out"]).name == name
        assert Path(end.get("policy", name)).name == name
        if config["task"] == "alfworld":                    # whose pocket model has a name of its own
            given["model"] = given["model"].replace("pocket", "pocket-alfworld")
        steps = given.get("total_timesteps", 5_000 if config["task"] == "alfworld" else 15_000)
        if "game" in given:
            given["game"] = [*given["game"]]                # as JSON has it
        assert {key: config[key] for key in given} == given and config["total_timesteps"] == steps, name
        updates, rollout = len(run["metrics"]), config["num_envs"] * config["num_steps"]
        assert updates == len(run["transcripts"]) and end["seed"] == 10_000, name
        if config.get("advantage", "gae") == "gae":
            assert updates == steps // rollout, name
        else:                                               # episodes are played to their ends: a rollout has more
            assert updates <= steps // rollout and steps - 2 * rollout < run["metrics"][-1]["env_steps"] < steps + 640
        games = {"blackjack": 10_000, "alfworld": 500, "frozenlake-dry": 200, "frozenlake-slippery": 300}
        kind = file.stem.partition("-seed")[0]
        games |= {"smol-blackjack": 1000, "smol-blackjack-no-cot": 1000}
        if end.get("draws_of_every_deal"):
            games |= {"numberline": 30 * 40, "ezpoints": 304 * 4, "points24": 715 * 2}
        game = find_game(config["task"]).__name__.lower()
        assert end["episodes"] == games.get(kind, 200 if kind.startswith("smol-") else games.get(game, 1000)), name
        assert file.stem.removeprefix("smol-").startswith(game) and file.stem.endswith(f"-seed{config['seed']}")
        # what its name says is in its settings
        assert ("imitation" in file.stem) == bool(config.get("imitation")), name
        assert ("no-cot" in file.stem or "features" in file.stem) == (not config.get("cot")), name


@pytest.mark.parametrize("name", ["numberline-seed4", "ezpoints-seed4", "blackjack-seed4", "points24-seed1"])
def test_the_main_tables_runs_have_todays_defaults(name):
    stored = json.loads((HERE / "results" / "runs" / f"{name}.json").read_text())["config"]
    apart = {"out", "seed", "model", "eval_episodes"}
    today = manifest.plain(pocket_settings(name.partition("-")[0]))
    own = {key: value for key, value in today.items() if key in stored and key not in apart}
    # settings that came later, or have other names since: what they stand for is today's default
    assert len(own) > 20 and own == {key: stored[key] for key in own}


def test_run_all_makes_the_runs_that_are_stored(make):
    """Its lines parse today, and what they ask for is in the stored runs' settings; every stored run has a line."""
    script, asks = read("results/run_all.sh").partition("\nexport -f")[0], r'python -c "[^"]+" \S*> /dev/null'
    assert len(re.findall(asks, script)) == 3
    listing = ["bash", "-c", re.sub(asks, "true", script) + "\nall_runs"]
    lines = subprocess.run(listing, cwd=HERE, capture_output=True, text=True, check=True).stdout.splitlines()
    stored = {file.stem: json.loads(file.read_text()) for file in (HERE / "results" / "runs").glob("*.json")}
    known, seen = make.baselines(), set()
    for line in lines:
        kind, name, games, *words = shlex.split(line)
        if kind in ("evaluate", "smol_start"):
            options, found = PARSERS["eval.py"]().parse_args(words), known.get(name, {})
            game = find_game(options.task).__name__.lower()
            assert name.removeprefix("smol-").startswith(game) and (not found or played(found, games)), name
            assert not options.policy or found.get("policy", options.policy) == options.policy, name
            continue
        if kind == "taught":                    # supervised fine-tuning alone, of so many steps
            assert played(known[name], games) and words[0].isdigit(), name
            continue
        if kind == "undecided":
            long = ["--game", "long=true"] if "-long-" in name else []
            words = ["--task", f"examples/undecided.py:{words[0]}", *long, *words[1:]]
        given = vars(PARSERS["-m lab.features" if kind == "features" else "train.py"]().parse_args(words))
        given.pop("model", None)
        if name in stored:
            seen.add(name)
            config = stored[name]["config"]
            assert {key: config[key] for key in given} == {
                key: [*value] if isinstance(value, tuple) else value for key, value in given.items()}, name
            assert played(stored[name]["eval"], games), name
    assert seen == set(stored)


def test_the_runs_are_of_one_code(make):
    """One hash of the method's files, whose value the log gives, but for those that the pages name: they are of older
    code and have none. SmolLM2's are of their own."""
    files = sorted((HERE / "results" / "runs").glob("*.json"))
    known = {file.stem: json.loads(file.read_text()).get("versions", {}).get("method")
             for file in files if not file.stem.startswith("smol-")}
    [method] = {found for found in known.values() if found}
    assert f"method {method}" in read("results/LOG.md")
    assert sum(known[run["name"]] == method for task in make.TASKS for run in make.runs(task)) == 20
    older = "features|imitation|gridworld|frozenlake"
    assert all(known[name] or re.search(older, name) for name in known)


def played(result, games):
    """Whether an evaluation is of so many games, or with "all:4" of every deal four times."""
    if games.startswith("all:"):        # before 30 November no evaluation was: those are still to be made again
        return result.get("draws_of_every_deal", int(games.removeprefix("all:"))) == int(games.removeprefix("all:"))
    return result["episodes"] == int(games)


# ---- links and commands ------------------------------------------------------------------------
def texts():
    """{page: its text}, of the notebook what is Markdown."""
    cells = json.loads(TUTORIAL.read_text())["cells"]
    notebook = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return {page: read(page) for page in PAGES} | {TUTORIAL.name: notebook}


def test_every_link_and_picture_of_the_pages_is_there():
    """Files that the pages and the notebook link to, and the headings that they jump to."""
    seen = 0
    for page, text in texts().items():
        text = re.sub(r"```.*?```", "", text, flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
            file, _, heading = "".join(target).partition("#")
            if file.startswith("http"):
                continue
            there = (HERE / page).parent / file if file else HERE / page
            assert there.exists(), (page, target)
            titles = re.findall(r"^#+ (.*)", there.read_text(), re.M) if heading else ()
            assert not heading or heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
                                              for title in titles}, (page, target)
            seen += 1
    assert seen > 30


SCRIPT = r"(?:python|torchrun \S+) (-m lab\.\w+|(?:results/)?\w+\.py)"


def test_every_command_in_the_readmes_parses():
    """Those in blocks and those in a sentence, where TASK and N stand for what a reader fills in."""
    text = "\n".join(texts().values()).replace("\\\n", " ")
    commands = re.findall(rf"^(?:pip install -r requirements.txt && )?{SCRIPT}([^#\n]*)", text, re.M)
    assert {script for script, _ in commands} >= {"train.py", "sft.py", "eval.py", "-m lab.pocket", "-m lab.bench"}
    sentences = re.findall(rf"`{SCRIPT}([^`]*)`", text)
    assert {script for script, _ in sentences + commands} <= set(PARSERS)
    whole = [(script, rest) for script, rest in sentences if rest and "…" not in rest]     # others name the script
    for script, rest in commands + whole:
        words = re.sub(r"\bTASK\b", "ezpoints", re.sub(r"\bN\b", "1", rest))
        PARSERS[script]().parse_args([word for word in shlex.split(words) if word != "--resume"])


def test_every_flag_that_a_page_names_is_there():
    """By itself in a sentence, such as `--micro-batch-size`; the log may name flags of its time."""
    known = {flag for script in PARSERS.values() for action in script()._actions for flag in action.option_strings}
    seen = set()
    for page in set(PAGES) - {"results/LOG.md"}:
        for words in re.findall(r"(?<!`)`(--[a-z][^`]*)`", read(page)):
            seen |= set(re.findall(r"--[a-z][a-z-]*", words))
    assert len(seen) > 12 and seen - known <= {"--resume"}
