"""A bucket gs://bucket on this machine: an emulator that gcsfs, TensorStore and Google's client are told of."""

import contextlib
import re
import socket
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

OBJECT = re.compile(r"(?:/download|/upload)?/storage/v1/b/(?P<bucket>[^/]+)/o(?:/(?P<name>.+))?")


@contextlib.contextmanager
def served():
    """The bucket's URL, while it is there."""
    from gcp_storage_emulator import exceptions, server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setenv("GOOGLE_CLOUD_PROJECT", "none")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        add_generations(server, exceptions.NotFound, patch)
        running = server.create_server("127.0.0.1", urlsplit(url).port, in_memory=True, default_bucket="bucket")
        running.start()
        try:
            yield "gs://bucket"
        finally:
            running.stop()


def add_generations(server, missing: type[Exception], patch) -> None:
    """What the emulator lacks and TensorStore builds on: conditions on an object's generation, and its being told."""
    handle, close = server.Router.handle, server.Response.close

    def generation(handler) -> tuple[str, dict]:
        """Of the object that a request is about, 0 where there is none; and the request's query."""
        url = urlsplit(handler.path)
        query, found = parse_qs(url.query), OBJECT.fullmatch(url.path)
        name = found and (found["name"] or query.get("name", [None])[0])
        try:
            return handler.storage.get_file_obj(found["bucket"], unquote(name))["generation"] if name else "0", query
        except missing:
            return "0", query

    def handle_if(router, method):
        handler = router._request_handler
        here, query = generation(handler)
        if query.get("ifGenerationMatch", [here]) != [here]:
            handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
            handler.send_response(412)
        elif query.get("ifGenerationNotMatch") == [here]:
            handler.send_response(304)
        else:
            return handle(router, method)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def close_with(response):
        response["x-goog-generation"] = generation(response._handler)[0]
        close(response)

    patch.setattr(server.Router, "handle", handle_if)
    patch.setattr(server.Response, "close", close_with)
