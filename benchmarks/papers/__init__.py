"""The papers' claims on real runs: shared runs first, then one module per claim.

The runs. A ``Spec`` names a run by all that decides it (model, seed, text, learning rate, schedule,
parent); its hash is its name in the cache, so claims that need the same run share it.
``study.trunk("dense", seed)`` and ``study.trunk("moe", seed)`` are those at a constant learning rate; any
field may be changed. Forks leave a run at a step whose state is stored (multiples of 200)::

    trunk = study.trunk("dense", seed)                              # 2,400 steps
    decay = trunk.fork(study.steps(1600), study.steps(400), schedule="1-sqrt")
    stage = trunk.fork(study.steps(2400), study.steps(300), mix="torch", fresh=True, warmup=study.steps(20),
                       weights=trunk.window(study.steps(2400), 10, study.steps(20)), learning_rate=4e-3)

Steps are counted from the beginning of the line: the decay's last snapshot is
``decay.at(study.steps(2000))``, and ``decay.at(study.steps(1500))`` is the trunk's. Write all steps at full
size and scale them with ``study.steps``, so that ``--quick`` works; multiples of 10 have snapshots, of 50
running averages (``spec.at(step, "power.05")``, ``"power.10"``), of 200 states.

``run = study.run(spec)`` trains what is missing and has ``losses``, ``gradient_norms``, ``learning_rates``
(one per step of its own), ``weights(step)``, ``state(step)`` (weights, optimizer, averages).

Merges. ``spec.window(step, last, spacing, method="sma", **options)`` is a merge of one line's snapshots,
``merge([snapshots], method, **options)`` of any; both are names, too, made when they are needed, by
``merge_state_dicts``. ``study.weights(snapshot or merge)`` is the state dict.

Scores. ``study.score(target, part="score", mix=None)`` is the loss (nats per byte) and accuracy (percent)
on a held-out text, kept on disk; ``study.gain(merge)`` is by how much it is better than its newest
snapshot. What is chosen is chosen with ``part="choose"`` (``study.best(targets)`` does), what is told is of
``"score"``. ``study.evaluate(spec, state_dict, part, mix)`` is for weights that have no name.

A claim is a module with what ``claims.Claim`` lists: ``runs(study, seed)``, ``measure(study)`` (over
``study.seeds``), ``verdicts(figures)``, ``draw(figures)``, ``TITLE`` and ``CONCLUSION``; its name goes into
``claims.NAMES``. ``verdict.interval(values)`` is the mean over seeds with its 95 % interval.
"""
