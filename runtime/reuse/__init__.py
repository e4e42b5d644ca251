"""Doing less per denoising step: what of earlier steps is used again, and when. Approximations, off unless asked for."""

from .plan import Plan, StepPlan, make_plan
from .policy import POLICIES, ReusePolicy, parse_policy

__all__ = ["POLICIES", "Plan", "ReusePolicy", "StepPlan", "make_plan", "parse_policy"]
