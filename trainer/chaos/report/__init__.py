"""A campaign's report for people: on a terminal while it works and after, as one page, as a picture."""

from trainer.chaos.report.page import html
from trainer.chaos.report.picture import matrix_png
from trainer.chaos.report.terminal import CampaignProgress, terminal

__all__ = ["CampaignProgress", "html", "matrix_png", "terminal"]
