"""The first page: what runs, who helps, how well it goes, live.

    words     numbers as people read them         charts    series as drawings
    regions   facts in, pieces of HTML out        live      one rendering for all viewers, sent as it changes
    pages     routes, roles, the way in by a link

Rendered here, so it works without a script; the script (assets/page.js) only swaps in newer pieces.
"""

from fastapi import FastAPI

from potluck.hub.dashboard import live, pages


def install(app: FastAPI) -> None:
    """Pages, their live stream and the link pages."""
    app.state.board = live.Board(app.state.desk)
    app.include_router(pages.router)


__all__ = ["install"]
