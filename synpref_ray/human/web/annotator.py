"""Pages of an annotator: what is left, the pair in hand, verdict, skip, undo."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Query
from fastapi.responses import JSONResponse, RedirectResponse, Response

from synpref_ray.human.accounts import Account
from synpref_ray.human.assignments import Lacking, Task
from synpref_ray.human.protocol import Given, required_evidence
from synpref_ray.human.web.forms import SignedForm, SkipForm, UndoForm, VerdictForm
from synpref_ray.human.web.site import CHOICES, Site, require_token
from synpref_ray.schema import TaskCategory


def annotator_routes(site: Site) -> APIRouter:
    """Return the routes; each one checks who asks, and the queue checks that the pair is theirs."""
    routes = APIRouter()

    @routes.get("/")
    def home(account: Annotated[Account, Depends(site.account)]) -> Response:
        return site.page("home.html", account, progress=site.queue.progress(account.user_id))

    @routes.post("/next")
    def next_pair(account: Annotated[Account, Depends(site.account)], form: Annotated[SignedForm, Form()]) -> Response:
        require_token(account, form.csrf)
        return _go_to(site.queue.lease_next(account.user_id))

    @routes.get("/assignments/{assignment_id}")
    def pair(account: Annotated[Account, Depends(site.account)], assignment_id: int) -> Response:
        return _task_page(site, account, site.queue.open(account.user_id, assignment_id))

    @routes.post("/assignments/{assignment_id}/verdict")
    def verdict(account: Annotated[Account, Depends(site.account)], assignment_id: int, form: Annotated[VerdictForm, Form()]) -> Response:
        require_token(account, form.csrf)
        given = form.given()
        try:
            return _go_to(site.queue.answer(account.user_id, assignment_id, form.revision, given))
        except Lacking as lacking:
            return _task_page(site, account, site.queue.open(account.user_id, assignment_id), given, lacking.problems)

    @routes.post("/assignments/{assignment_id}/skip")
    def skip(account: Annotated[Account, Depends(site.account)], assignment_id: int, form: Annotated[SkipForm, Form()]) -> Response:
        require_token(account, form.csrf)
        return _go_to(site.queue.skip(account.user_id, assignment_id, form.reason))

    @routes.post("/assignments/{assignment_id}/renew")
    def renew(account: Annotated[Account, Depends(site.account)], assignment_id: int, form: Annotated[SignedForm, Form()]) -> Response:
        require_token(account, form.csrf)
        return JSONResponse({"leased_until": site.queue.renew(account.user_id, assignment_id)})

    @routes.post("/undo")
    def undo(account: Annotated[Account, Depends(site.account)], form: Annotated[UndoForm, Form()]) -> Response:
        require_token(account, form.csrf)
        return _go_to(site.queue.undo(account.user_id, form.assignment_id, form.revision))

    @routes.get("/guideline")
    def guideline(
        account: Annotated[Account, Depends(site.account)],
        task_category: Annotated[str, Query(max_length=50)] = "",
        objectivity: Annotated[str, Query(max_length=50)] = "",
        controversiality: Annotated[str, Query(max_length=50)] = "",
    ) -> Response:
        values = {"task_category": task_category, "objectivity": objectivity, "controversiality": controversiality}
        return JSONResponse({"guideline": site.guideline_of(values), "kind": site.kind_of(values)})

    return routes


def _go_to(assignment_id: int | None) -> Response:
    return RedirectResponse("/" if assignment_id is None else f"/assignments/{assignment_id}", 303)


def _task_page(site: Site, account: Account, task: Task, given: Given | None = None, lacking: list[str] | None = None) -> Response:
    attributes = given.attributes if given else task.attributes
    entered: dict[str, Any] = given.model_dump() if given else {"choice": "", "strength": 2, "rationale": "", **_NO_EVIDENCE, **task.earlier}
    return site.page(
        "pair.html",
        account,
        422 if lacking else 200,
        task=task,
        progress=site.queue.progress(account.user_id),
        attributes={name: attributes.get(name) or "" for name in (*CHOICES, "desired_attributes", "annotation_guideline")},
        entered=entered,
        problems=lacking or [],
        guideline=site.guideline_of(attributes),
        kind=site.kind_of(attributes),
        edited=given is not None and any((given.attributes[name] or "") != (task.attributes.get(name) or "").strip() for name in given.attributes),
        evidence={category.value: required_evidence(category.value, site.protocol) or "" for category in TaskCategory},
        show_notes=site.protocol.show_notes and any(task.notes),
        renew_seconds=int(60 * site.protocol.lease_minutes / 3),
    )


_NO_EVIDENCE = {"search_link": "", "code_run": "", "llm_helped": False, "own_judgement": False}
