from adapt.report.page import build

__all__ = ["build"]
