"""The pages: what runs, who helps, how well it goes, live; and a way to give jobs to do without a terminal.

    words     numbers as people read them         charts, figures   series as drawings
    regions   facts of runs in, pieces of HTML    jobviews          the facts of jobs and machines
    views     which page shows what, to whom      live              one rendering for all viewers, sent as it changes
    answers   headers, frame, refusals            session           coming in by a link or a credential, leaving
    pages     routes of runs                      jobs, submit      routes of jobs and machines, of the form
    gangs     routes of gangs                     gangviews         the facts of a gang and its members
    folders   what of a folder belongs to a job   unzip             an archive from a stranger, opened with care

Rendered here, so it works without a script; the scripts (assets/) swap in newer pieces, follow a log, send a folder.
"""

from fastapi import APIRouter, FastAPI

from potluck.hub.dashboard import gangs, jobs, live, pages, session, submit


def routers() -> list[APIRouter]:
    return [pages.router, session.router, jobs.router, gangs.router, submit.router, submit.pieces]


def install(app: FastAPI) -> None:
    """Pages, their live stream, the link pages and the form."""
    app.state.board = live.Board(app.state.desk)
    app.state.patience = session.Patience()
    for router in routers():
        app.include_router(router)


__all__ = ["install", "routers"]
