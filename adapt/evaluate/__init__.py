"""What is measured, by the same suites in runs, by `adapt evaluate` and for the report.

A suite is built from its config (`@suites.register(name)`) and called with an EvalContext (context.py); it
returns `{metric: value}`. Metrics are named `<what>/<dataset>/...`.
"""
