"""Pages of an admin: the queue's state, annotators, agreement, disputes to settle, and the export."""

from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from fastapi import APIRouter, Depends, Form
from fastapi.responses import RedirectResponse, Response
from sqlalchemy import select

from synpref_ray.human.accounts import Account
from synpref_ray.human.database import Adjudication, Assignment, AuditEvent, Item, NotFound, State, User, VerdictRow
from synpref_ray.human.protocol import UNDECIDABLE, is_swapped
from synpref_ray.human.results import adjudication_table, attribute_table, skip_table, verdict_table, vote_table
from synpref_ray.human.web.forms import AdjudicationForm
from synpref_ray.human.web.site import Site, require_token

Table = Literal["verdicts", "votes", "attributes", "skips", "adjudications"]
STRENGTHS = {1: "slightly", 2: "clearly", 3: "strongly"}


def admin_routes(site: Site) -> APIRouter:
    """Return the routes; each one checks that an admin asks."""
    routes = APIRouter(prefix="/admin")

    @routes.get("")
    def overview(account: Annotated[Account, Depends(site.admin)]) -> Response:
        found = site.results.snapshot()
        waiting = [{"id": found.items[pair_id]["id"], "stuck": pair_id in found.stuck} for pair_id in found.to_adjudicate]
        standings, agreement = found.standings, found.agreement()
        return site.page("admin.html", account, snapshot=found, standings=standings, agreement=agreement, waiting=waiting)

    @routes.get("/items/{item_id}")
    def dispute(account: Annotated[Account, Depends(site.admin)], item_id: int) -> Response:
        return site.page("dispute.html", account, **_dispute(site, account, item_id))

    @routes.post("/items/{item_id}/adjudicate")
    def adjudicate(account: Annotated[Account, Depends(site.admin)], item_id: int, form: Annotated[AdjudicationForm, Form()]) -> Response:
        require_token(account, form.csrf)
        first, second = _dispute(site, account, item_id)["sides"]
        verdict = {"1": first, "2": second}.get(form.choice, UNDECIDABLE)
        site.results.adjudicate(account.user_id, item_id, verdict, form.rationale, form.words)
        found = site.results.snapshot()
        places = {row["id"]: place for place, row in enumerate(found.items.values())}
        waiting = [found.items[pair_id]["id"] for pair_id in found.to_adjudicate]
        later = [number for number in waiting if places[number] > places[item_id]] or waiting  # one that was passed over comes round again
        return RedirectResponse(f"/admin/items/{later[0]}" if later else "/admin", 303)

    @routes.get("/export/{table}.parquet")
    def export(account: Annotated[Account, Depends(site.admin)], table: Table) -> Response:
        logs = {"votes": vote_table, "skips": skip_table, "adjudications": adjudication_table}
        tables = {"verdicts": verdict_table, "attributes": attribute_table}
        rows = logs[table](site.database) if table in logs else tables[table](site.results.snapshot())
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd")
        headers = {"Content-Disposition": f'attachment; filename="{table}.parquet"'}
        return Response(sink.getvalue().to_pybytes(), media_type="application/vnd.apache.parquet", headers=headers)

    return routes


def _dispute(site: Site, account: Account, item_id: int) -> dict[str, Any]:
    """Return what a dispute's page shows: the pair in an order of the admin's own, and each vote as reply 1 or 2 in that order."""
    with site.database.read() as session:
        item = session.get(Item, item_id) if 0 < item_id < 2**31 else None
        if item is None:
            raise NotFound("There is no such pair.")
        said = select(VerdictRow, User.name).join(Assignment, VerdictRow.assignment_id == Assignment.id).join(User, Assignment.user_id == User.id)
        said = said.where(Assignment.item_id == item.id, Assignment.state == State.DONE.value, VerdictRow.revision == Assignment.revision)
        votes = [(row, name) for row, name in session.execute(said.order_by(VerdictRow.id))]
        skipped = select(AuditEvent.detail, User.name).join(User, AuditEvent.user_id == User.id)
        skipped = skipped.where(AuditEvent.action == "skip", AuditEvent.subject == item.pair_id).order_by(AuditEvent.id)
        skips = [(name, detail["reason"]) for detail, name in session.execute(skipped)]
        words = list(session.scalars(select(Adjudication).where(Adjudication.item_id == item.id).order_by(Adjudication.id)))
    sides = ("rejected", "chosen") if is_swapped(site.database.salt, item.pair_id, account.name) else ("chosen", "rejected")
    names = {sides[0]: "reply 1", sides[1]: "reply 2", UNDECIDABLE: "cannot decide"}
    return {
        "item": item,
        "sides": sides,
        "replies": tuple(item.content[side] for side in sides),
        "votes": [(row, name, names[row.verdict]) for row, name in votes],
        "skips": skips,
        "strengths": STRENGTHS,
        "num_words": len(words),
        "word": names[words[-1].verdict] if words else "",
        "guideline": site.guideline_of(item.attributes),
        "kind": site.kind_of(item.attributes),
    }
