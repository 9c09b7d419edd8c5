"""How a model's weights divide over ranks: plans (pure data), where they come from, and applying them.

plan.py, rules.py, layers.py    plans as data; the declared plan of our own Llama family, and putting it on
shard.py                        shard, unshard, plan, explain: any model, edited by nobody
  planner.py                    a copy, the search, the proof, and from the traced layers to all
    surrogate.py, inputs.py,    what is traced: a disposable copy, on guessed inputs, also the parts that
    unreached.py                  inputs do not reach
    search.py                   trace, judge, decide, trace again, until every family of weights divides
    trace/                      labels of elements through ATen operations, partial sums, integers
    families.py, shares.py      units that stay together, families of them, how many a rank gets
    gathers.py                  what no pair divides: cut by columns or by tokens, for a collective each
    build.py, expand.py         a plan from a trace; from one layer to all
    verify.py                   all ranks in one process against the whole model
  shardplan.py, plan_cache.py   that plan as data, on disk
  declared.py                   plans that somebody wrote, as limits of the search
  apply.py, norms.py            weights cut, integers set, hooks; and back
"""
