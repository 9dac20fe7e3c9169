"""The routes: OpenAI's videos, images and models, health, metrics."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lemica_trt.core.errors import InputError, LemicaError
from lemica_trt.core.pictures import decoded_picture
from lemica_trt.endpoint.errors import Refused, error_object, status_of
from lemica_trt.endpoint.guard import Guard
from lemica_trt.endpoint.health import Health
from lemica_trt.endpoint.jobs import Job, Jobs
from lemica_trt.endpoint.metrics import CONTENT_TYPE, Metrics
from lemica_trt.endpoint.requests import PARAMETERS, Asked, Model, body_from_form, body_from_json

BODY_SECONDS = 30.0
"""How long a client may take to send its request."""

MOST_FIELDS = 64
"""Of a form."""

LISTED = 20
"""Videos in an answer to GET /v1/videos where no limit is given; at most 100."""

T = TypeVar("T")


class Endpoint:
    """The routes of one bundle.

    Args:
        model: what can be asked for.
        jobs: who does it.
        metrics: what is counted.
        created: when it started, seconds since 1970.
        health: whether it is ready; None: made of `jobs`.
    """

    def __init__(self, model: Model, jobs: Jobs, metrics: Metrics, created: int, health: Health | None = None) -> None:
        self._model, self._jobs, self._metrics, self._created = model, jobs, metrics, created
        self._health = health or Health(jobs)
        self._pictures = ThreadPoolExecutor(1, "lemica-trt-pictures")  # of one at a time, however many are sent

    def app(self, key: str | None = None) -> Starlette:
        """The ASGI application.

        Args:
            key: the bearer token that requests must have; None: no token, and this machine only.
        """
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/models/{model:path}", self.one_model),
                Route("/v1/images/generations", self.make_image, methods=["POST"]),
                Route("/v1/videos", self.make_video, methods=["POST"]),
                Route("/v1/videos", self.videos),
                Route("/v1/videos/{video}", self.video),
                Route("/v1/videos/{video}", self.delete, methods=["DELETE"]),
                Route("/v1/videos/{video}/content", self.content),
                Route("/health/live", self.live),
                Route("/health/ready", self.ready),
                Route("/metrics", self.metrics),
            ],
            middleware=[Middleware(Guard, key=key, most=self._model.max_body_bytes)],
            exception_handlers={LemicaError: _answer_error, HTTPException: _answer_http_error},
        )

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the bundle, and each of its plans."""
        return JSONResponse({"object": "list", "data": [self._model_object(name) for name in self._model.ids]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["model"]
        if name not in self._model.ids:
            raise Refused(404, "model_not_found", f"no such model; there are {', '.join(self._model.ids)}")
        return JSONResponse(self._model_object(name))

    async def make_video(self, request: Request) -> Response:
        """POST /v1/videos: the job; the whole clip where `response_format` asks for it, as Dynamo's clients do."""
        asked = await self._asked(request, image=False)
        job = self._jobs.submit(asked, ".mp4", listed=not asked.inline)
        if not asked.inline:
            return JSONResponse(self._video_object(job))
        data = await self._wait(request, job)
        return JSONResponse({**self._video_object(job), "data": [{"b64_json": base64.b64encode(data).decode()}]})

    async def make_image(self, request: Request) -> Response:
        """POST /v1/images/generations: the image; a client that goes away cancels it."""
        job = self._jobs.submit(await self._asked(request, image=True), ".png", listed=False)
        data = base64.b64encode(await self._wait(request, job)).decode()
        return JSONResponse(
            {
                "created": int(job.created_at),
                "data": [{"b64_json": data}],
                "output_format": "png",
                "size": self._model.size,
            }
        )

    async def _asked(self, request: Request, *, image: bool) -> Asked:
        """What a request asks for; its pictures have been decoded once.

        Raises:
            InputError: as `Model.read`; or one is no picture.
        """
        asked = self._model.read(await _body(request, self._model.max_body_bytes), image=image)
        for name, data in (
            ("input_reference", asked.generation.image),
            ("last_image", asked.generation.last_image),
        ):
            if data is not None:
                decode = partial(decoded_picture, data, name=name)
                await asyncio.get_running_loop().run_in_executor(self._pictures, decode)
        return asked

    async def videos(self, request: Request) -> Response:
        """GET /v1/videos: what is known, page by page; the newest first."""
        query = request.query_params
        limit, order, after = query.get("limit", str(LISTED)), query.get("order", "desc"), query.get("after")
        if not re.fullmatch(r"[1-9]\d?|100", limit, re.ASCII):
            raise InputError("limit must be a number from 1 to 100")
        if order not in ("asc", "desc"):
            raise InputError("order must be asc or desc")
        jobs = self._jobs.all()[:: 1 if order == "asc" else -1]
        if after is not None:
            names = [job.id for job in jobs]
            if after not in names:
                raise InputError("after must be the id of a video")
            jobs = jobs[names.index(after) + 1 :]
        page = [self._video_object(job) for job in jobs[: int(limit)]]
        ids = [video["id"] for video in page] or [None]
        more = len(jobs) > len(page)
        return JSONResponse({"object": "list", "data": page, "first_id": ids[0], "last_id": ids[-1], "has_more": more})

    async def video(self, request: Request) -> Response:
        """GET /v1/videos/ID: status and progress."""
        return JSONResponse(self._video_object(self._jobs.find(request.path_params["video"])))

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/videos/ID: forget it; cancel it if it waits or runs."""
        name = request.path_params["video"]
        self._jobs.remove(name)
        return JSONResponse({"id": name, "object": "video.deleted", "deleted": True})

    async def content(self, request: Request) -> Response:
        """GET /v1/videos/ID/content: the MP4 file."""
        job = self._jobs.find(request.path_params["video"])
        if request.query_params.get("variant", "video") != "video":
            raise InputError("variant must be video: no thumbnails and no sprite sheets are made")
        if job.error is not None:
            raise Refused(404, "video_failed", f"there is no video: {job.error['message']}")
        if job.data is None:
            raise Refused(404, "video_not_ready", f"the video is not ready: {job.status}, {job.progress} %")
        job.fetched = True
        name = f'attachment; filename="{job.id}{job.suffix}"'
        return Response(job.data, media_type="video/mp4", headers={"Content-Disposition": name})

    async def live(self, request: Request) -> Response:
        """GET /health/live: the process answers."""
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """GET /health/ready: the engines run."""
        ready, what = await self._health.check()
        return JSONResponse(what, status_code=200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self._metrics.page(self._jobs), headers={"Content-Type": CONTENT_TYPE})

    async def _wait(self, request: Request, job: Job) -> bytes:
        """A job's file; then nothing of it is kept.

        Raises:
            Refused: it failed, or the client has gone.
        """

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        done, left = asyncio.wrap_future(job.future), asyncio.ensure_future(gone())
        try:
            await asyncio.wait((done, left), return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            self._jobs.forget(job)
        if job.data is None:
            error = job.error or {"message": "the client has gone", "code": "cancelled"}
            raise Refused(job.error_status, str(error["code"]), str(error["message"]), retry_after=job.retry_after)
        return job.data

    def _model_object(self, name: str) -> dict[str, Any]:
        plan = self._model.plans[self._model.ids[name]]
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "lemica-trt",
            "plan": plan.name,
            "full_steps": plan.budget,
            "num_inference_steps": plan.num_steps,
            "makes": "image" if self._model.makes_images else "video",
            "size": self._model.size,
            "num_frames": self._model.shape.frames,
            "fps": self._model.shape.fps,
        }

    def _video_object(self, job: Job) -> dict[str, Any]:
        """OpenAI's video object; prompts are not given back."""
        completed = None if job.completed_at is None else int(job.completed_at)
        return {
            "id": job.id,
            "object": "video",
            "model": job.model,
            "plan": job.plan,
            "status": job.status,
            "progress": job.progress,
            "created_at": int(job.created_at),
            "completed_at": completed,
            "expires_at": None if completed is None else completed + int(self._jobs.expiry),
            "seconds": self._model.seconds,
            "size": self._model.size,
            "remixed_from_video_id": None,
            "error": job.error and {"code": job.error["code"], "message": job.error["message"]},
        }


async def _body(request: Request, most: int) -> dict[str, Any]:
    """The parameters of a request, JSON or a form, of which nothing is written to disk.

    Args:
        most: bytes of it.

    Raises:
        InputError: they are neither, or cannot be read.
        Refused: another content type (415), or it takes too long (408).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return body_from_json(await _in_time(request.body()))
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        try:
            form = await _in_time(
                _form(request, most) if kind == "multipart/form-data" else request.form(max_fields=MOST_FIELDS)
            )
        except (MultiPartException, HTTPException) as error:
            raise InputError(f"the body must be a form: {getattr(error, 'detail', error)}") from None
        fields = {name: value if isinstance(value, str) else await value.read() for name, value in form.items()}
        await form.close()
        return body_from_form(fields)
    raise Refused(415, "unsupported_media_type", "the body must be application/json or multipart/form-data")


async def _form(request: Request, most: int) -> FormData:
    """A form with files: as `request.form` reads it, in memory and with fields as large as the request may be."""
    parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=MOST_FIELDS)
    parser.max_part_size = parser.spool_max_size = most
    return await parser.parse()


async def _in_time(reading: Awaitable[T]) -> T:
    try:
        return await asyncio.wait_for(_awaited(reading), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, "request_timeout", f"a request must be sent within {BODY_SECONDS:g} seconds") from None
    except ClientDisconnect:
        raise Refused(499, "cancelled", "the client has gone") from None


async def _awaited(reading: Awaitable[T]) -> T:
    return await reading


Handler = Callable[[Request, Exception], Response]


def _answer_error(request: Request, error: Exception) -> Response:
    status, _ = status_of(error)
    after = error.retry_after if isinstance(error, Refused) else None
    headers = {} if after is None else {"Retry-After": str(after)}
    return JSONResponse({"error": error_object(error, PARAMETERS)}, status_code=status, headers=headers)


def _answer_http_error(request: Request, error: Exception) -> Response:
    """What Starlette refuses itself: no such path, no such method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    refused = Refused(error.status_code, code, f"{error.detail}: see docs/serving.md for the paths that there are")
    return JSONResponse({"error": error_object(refused)}, status_code=error.status_code, headers=error.headers)
