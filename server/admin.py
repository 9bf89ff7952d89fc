"""The routes on masks themselves: what there is, and how it is added, replaced, pinned, named and removed."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from maskllm.capacity import Capacity, memory
from server.access import ADMIN, Caller, User
from server.errors import BadMaskName, BadSource, RefusedMask, UnknownMask
from server.masks import SUFFIX, Mask, MaskCard, Masks
from server.names import DENSE, Weights
from server.sources import CHUNK, landing
from server.strict import StrictRoute


class MaskSource(BaseModel, extra="forbid"):
    """Where `PUT /v1/masks/{name}` finds the mask."""

    file: str | None = None
    """File under the masks folder, of which NAME.safetensors becomes a copy (default: that one as it is)."""
    url: str | None = None
    """hf://org/repo/file, https://..., s3://...; fetched into the folder, and goes with `sha256`."""
    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] | None = None


class AliasTargets(BaseModel, extra="forbid"):
    """What an alias stands for."""

    masks: Weights


class AliasCard(BaseModel, use_attribute_docstrings=True):
    """An alias as it is shown."""

    id: str
    object: Literal["alias"] = "alias"
    masks: dict[str, float]
    """How often each answers, in proportion."""


class MaskList(BaseModel, use_attribute_docstrings=True):
    object: Literal["list"] = "list"
    data: list[MaskCard]
    refused: dict[str, str]
    """Files of the folder that are no masks here, and why."""


class AliasList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AliasCard]


class Slots(BaseModel, use_attribute_docstrings=True):
    total: int
    used: int
    pinned: int
    most: int
    """How many would fit."""


class Packed(BaseModel, use_attribute_docstrings=True):
    limit: int
    used: int
    known: int


class CapacityCard(BaseModel, use_attribute_docstrings=True):
    """What each thing takes, and how many masks fit where."""

    bytes: Capacity
    gpu: Capacity | None
    """Of each GPU, which then holds base, slots and KV; `bytes` is of the host's memory."""
    slots: Slots
    packed: Packed
    sum: str


def routes(masks: Masks, capacity: Capacity, gpu: Capacity | None) -> APIRouter:
    """The routes of one engine's masks; `capacity` is the host's."""
    router = APIRouter(prefix="/v1", route_class=StrictRoute)

    async def shown(mask: Mask, caller: Caller) -> MaskCard:
        return (await masks.describe([mask], caller.may_use))[0]

    @router.get("/masks")
    async def list_masks(caller: User) -> MaskList:
        """Every mask that the caller may use, and why files of the folder were refused."""
        listed = [mask for name, mask in masks.known.items() if caller.may_use(name)]
        refused = {name: why for name, why in masks.refused.items() if caller.may_use(name)}
        return MaskList(data=await masks.describe(listed, caller.may_use), refused=refused)

    @router.get("/masks/{name}")
    async def show_mask(name: str, caller: User) -> MaskCard:
        caller.check(name)
        if name == DENSE:
            raise UnknownMask(f"{DENSE!r} is the dense base, not a mask")
        return await shown(masks.names.mask(name, caller.may_use), caller)

    body = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    body["application/json"] = {"schema": MaskSource.model_json_schema()}

    @router.put(
        "/masks/{name}",
        dependencies=[ADMIN],
        responses={201: {"description": "A mask of a new name", "model": MaskCard}},
        openapi_extra={"requestBody": {"content": body}},
    )
    async def put_mask(name: str, request: Request, response: Response, caller: User) -> MaskCard:
        """Load a mask, or replace the one of that name, from an upload, a URL or a file of the folder.

        A body of `application/octet-stream` is the file itself; JSON says where it is; nothing means
        NAME.safetensors in the folder, which becomes a copy of any other.
        """
        masks.check(name)
        own = f"{name}{SUFFIX}"
        with masks.metrics.refused.count_exceptions(RefusedMask):
            if request.headers.get("content-type", "").startswith("application/octet-stream"):
                request.state.max_body_bytes = masks.most_bytes
                with landing(masks.folder, masks.most_bytes) as landed:
                    await landed.receive(request.stream())
                    mask, new = await masks.put(name, landed.path)
            else:
                source = _source(await request.body())
                if source.url and source.sha256:
                    with landing(masks.folder, masks.most_bytes) as landed:
                        await landed.fetch(source.url, source.sha256)
                        mask, new = await masks.put(name, landed.path)
                elif source.url or source.sha256:
                    raise BadSource("a mask from a url needs both, `url` and `sha256`", "url")
                elif source.file in (None, own):  # which may be a link to elsewhere, as at the start
                    mask, new = await masks.put(name, masks.folder / own)
                else:
                    file = masks.path(source.file)
                    with landing(masks.folder, masks.most_bytes) as landed:
                        await landed.receive(_content(file))
                        mask, new = await masks.put(name, landed.path, file.name)
        response.status_code = 201 if new else 200
        return await shown(mask, caller)

    @router.delete("/masks/{name}", status_code=204, dependencies=[ADMIN])
    async def delete_mask(name: str) -> None:
        """Forget a mask; answers when its last request has finished and its memory is free."""
        await masks.delete(name)

    @router.post("/masks/{name}/load", dependencies=[ADMIN])
    async def load_mask(name: str, caller: User) -> MaskCard:
        """Bring a mask into host memory before its first request."""
        return await shown(await masks.load(name), caller)

    @router.put("/masks/{name}/pin", dependencies=[ADMIN])
    async def pin_mask(name: str, caller: User) -> MaskCard:
        """Keep a mask in a slot, whoever else comes."""
        return await shown(await masks.pin(name, True), caller)

    @router.delete("/masks/{name}/pin", dependencies=[ADMIN])
    async def unpin_mask(name: str, caller: User) -> MaskCard:
        return await shown(await masks.pin(name, False), caller)

    @router.get("/aliases")
    async def list_aliases(caller: User) -> AliasList:
        """Every alias that the caller may use, and the shares of those masks that it may use, too."""
        aliases = {
            name: {mask: weight for mask, weight in weights.items() if caller.may_use(mask)}
            for name, weights in masks.names.aliases.items()
            if caller.may_use(name)
        }
        return AliasList(data=[AliasCard(id=name, masks=weights) for name, weights in aliases.items()])

    @router.put(
        "/aliases/{name}",
        dependencies=[ADMIN],
        responses={201: {"description": "An alias of a new name", "model": AliasCard}},
    )
    async def put_alias(name: str, targets: AliasTargets, response: Response) -> AliasCard:
        """Let a name stand for a mask, or for several by weight. `default` answers what names no mask."""
        response.status_code = 201 if await masks.names.alias(name, targets.masks) else 200
        return AliasCard(id=name, masks=targets.masks)

    @router.delete("/aliases/{name}", status_code=204, dependencies=[ADMIN])
    async def delete_alias(name: str) -> None:
        await masks.names.unalias(name)

    @router.get("/capacity", dependencies=[ADMIN])
    async def show_capacity() -> CapacityCard:
        """What each thing takes, and how many masks fit where."""
        used, pinned = len((await masks.engine.stats()).get("slots", {})), len(masks.names.pinned)
        held = replace(capacity, packed=masks.place)
        return CapacityCard(
            bytes=held,
            gpu=gpu,
            slots=Slots(total=masks.slots, used=used, pinned=pinned, most=(gpu or held).most_slots()),
            packed=Packed(limit=masks.limit, used=len(masks.packed), known=len(masks.known)),
            sum=memory(held, gpu, masks.slots, masks.limit),
        )

    return router


def _source(body: bytes) -> MaskSource:
    try:
        return TypeAdapter(MaskSource).validate_json(body or b"{}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise BadSource(f"{where}: {first['msg']}", where) from None


async def _content(file: Path) -> AsyncIterator[bytes]:
    """A file of the folder in chunks. Copied and not linked: who writes into it changes one mask, not two.

    Raises BadMaskName where there is none, or RefusedMask where it cannot be read.
    """
    try:
        with file.open("rb") as source:
            while chunk := await asyncio.to_thread(source.read, CHUNK):
                yield chunk
    except FileNotFoundError:
        raise BadMaskName(f"no file {file.name!r} in the masks folder") from None
    except OSError as error:
        raise RefusedMask(f"{file.name} cannot be read: {error.strerror}") from None
