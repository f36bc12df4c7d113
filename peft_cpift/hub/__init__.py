"""A run on the Hub: its result, core regions, report and model card in one repository."""

from peft_cpift.hub.push import push_run

__all__ = ["push_run"]
