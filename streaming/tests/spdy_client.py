#!/usr/bin/env python3
"""A SPDY/3.1 client of remotecommand and port-forward that shares nothing with the server: its own
frames, and header blocks by Python's zlib with SPDY's dictionary. Prints what it saw as JSON.

    spdy_client.py '{"url": ..., "mode": "exec", ...}'

exec: protocols (list, the request's X-Stream-Protocol-Version), streams (list of streamType), stdin
(text, sent `times` times, in pieces of `piece` bytes), sizes (list of [width, height, text to wait for in stdout
first]), window (bytes; makes the client keep windows, and check that the server does).
portforward: connections (list of {port, send, no_request_id}).
"""
import base64
import json
import socket
import ssl
import struct
import sys
import urllib.parse
import zlib

WORDS = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language "
    "accept-ranges age allow authorization cache-control connection content-base content-encoding "
    "content-language content-length content-location content-md5 content-range content-type date "
    "etag expect expires from host if-match if-modified-since if-none-match if-range "
    "if-unmodified-since last-modified location max-forwards pragma proxy-authenticate "
    "proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade "
    "user-agent vary via warning www-authenticate method get status"
).split() + ["200 OK"] + "version HTTP/1.1 url public set-cookie keep-alive origin".split()
DICTIONARY = b"".join(struct.pack(">I", len(w)) + w.encode() for w in WORDS) + (
    b"100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    b"203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request"
    b"401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented"
    b"503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 "
    b"Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,"
    b"application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age="
    b"gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)
assert len(DICTIONARY) == 1423 and zlib.adler32(DICTIONARY) == 0xE3C6A7C2

SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE = 1, 2, 3, 4, 6, 7, 8, 9


class Closed(Exception):
    pass


class Spdy:
    def __init__(self, url, protocols):
        url = urllib.parse.urlsplit(url)
        self.socket = socket.create_connection((url.hostname, url.port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if url.scheme == "https":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self.socket = context.wrap_socket(self.socket, server_hostname=url.hostname)
        lines = [f"POST {url.path} HTTP/1.1", f"Host: {url.netloc}", "Connection: Upgrade", "Upgrade: SPDY/3.1"]
        lines += [f"X-Stream-Protocol-Version: {p}" for p in protocols] + ["Content-Length: 0", "", ""]
        self.socket.sendall("\r\n".join(lines).encode())
        self.buffer = b""
        while b"\r\n\r\n" not in self.buffer:
            self.fill()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        status, *headers = head.decode().split("\r\n")
        self.status = int(status.split()[1])
        self.headers = [tuple(h.split(": ", 1)) for h in headers]
        if self.status == 101:
            assert [v.lower() for v in self.header("Connection")] == ["upgrade"], head
            assert [v.lower() for v in self.header("Upgrade")] == ["spdy/3.1"], head
        self.deflate = zlib.compressobj(zdict=DICTIONARY)
        self.inflate = zlib.decompressobj(zdict=DICTIONARY)
        self.next = 1
        self.replied, self.resets, self.updates = [], {}, {}

    def header(self, name):
        return [v for k, v in self.headers if k.lower() == name.lower()]

    def fill(self):
        data = self.socket.recv(1 << 16)
        if not data:
            raise Closed
        self.buffer += data

    def take(self, count):
        while len(self.buffer) < count:
            self.fill()
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def control(self, kind, body, flags=0):
        self.socket.sendall(struct.pack(">HHI", 0x8003, kind, flags << 24 | len(body)) + body)

    def block(self, headers):
        block = struct.pack(">I", len(headers))
        for text in (t.encode() for pair in headers.items() for t in pair):
            block += struct.pack(">I", len(text)) + text
        return self.deflate.compress(block) + self.deflate.flush(zlib.Z_SYNC_FLUSH)

    def open(self, headers):
        stream, self.next = self.next, self.next + 2
        self.control(SYN_STREAM, struct.pack(">IIH", stream, 0, 0) + self.block(headers))
        return stream

    def send(self, stream, data, fin=False):
        self.socket.sendall(struct.pack(">II", stream, (1 << 24 if fin else 0) | len(data)) + data)

    def read(self):
        """The next frame: (kind, stream or id, flags, body)."""
        word, rest = struct.unpack(">II", self.take(8))
        flags, length = rest >> 24, rest & 0xFFFFFF
        body = self.take(length)
        if not word >> 31:
            return "data", word, flags, body
        assert word >> 16 == 0x8003, hex(word)
        kind = word & 0xFFFF
        (stream,) = struct.unpack(">I", body[:4])
        if kind == SYN_REPLY:
            # Whatever Python's zlib makes of it: no headers.
            block = self.inflate.decompress(body[4:])
            assert block == b"\0\0\0\0", block
            # Python's zlib can do without, but Go's (all of Kubernetes' clients) cannot.
            assert body.endswith(b"\0\0\xff\xff"), "no sync flush at the end of the block"
            self.replied.append(stream)
        elif kind == RST_STREAM:
            self.resets[stream] = struct.unpack(">I", body[4:])[0]
        elif kind == WINDOW_UPDATE:
            self.updates[stream] = self.updates.get(stream, 0) + struct.unpack(">I", body[4:])[0]
        return kind, stream, flags, body


def text(data):
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "base64:" + base64.b64encode(data).decode()


def run_exec(request, seen):
    spdy = Spdy(request["url"], request.get("protocols", ["v4.channel.k8s.io"]))
    seen["status"] = spdy.status
    seen["protocol"] = spdy.header("X-Stream-Protocol-Version")
    seen["accepted"] = spdy.header("X-Accepted-Stream-Protocol-Versions")
    if spdy.status != 101:
        return
    window = request.get("window")
    credit, longest = {0: 65536}, 0
    if window:
        spdy.control(SETTINGS, struct.pack(">III", 1, 7, window))
    streams = {}
    for name in request["streams"]:
        streams[spdy.open({"streamtype": name, "x-note": "x" * 300})] = name
    by_name = {name: stream for stream, name in streams.items()}
    received = {name: bytearray() for name in request["streams"]}
    ended = set()
    stdin = request.get("stdin")
    sizes = request.get("sizes", [])
    spdy.control(PING, struct.pack(">I", 7))
    if stdin is not None:
        data, piece = stdin.encode() * request.get("times", 1), request.get("piece", 1000)
        for start in range(0, len(data), piece):
            spdy.send(by_name["stdin"], data[start : start + piece])
        spdy.send(by_name["stdin"], b"", fin=True)
    held = 0
    try:
        while True:
            while sizes and sizes[0][2].encode() in received["stdout"]:
                width, height, _ = sizes.pop(0)
                size = json.dumps({"Width": width, "Height": height}).encode() + b"\n"
                spdy.send(by_name["resize"], size[:9])
                spdy.send(by_name["resize"], size[9:])
            kind, stream, flags, body = spdy.read()
            if kind == "data":
                assert stream in spdy.replied, "data before SYN_REPLY"
                name = streams[stream]
                assert name not in ended, f"data on {name} after its end"
                received[name] += body
                if flags & 1:
                    ended.add(name)
                if window:
                    for key in (0, stream):
                        credit[key] = credit.get(key, window) - len(body)
                        assert credit[key] >= 0, f"window of {key} overrun by {-credit[key]}"
                    held += len(body)
                    # Grants come late and in odd sizes: what a slow client does.
                    if held and min(credit[0], credit[stream]) == 0:
                        longest = max(longest, held)
                        for key in (0, stream):
                            credit[key] += held
                            spdy.control(WINDOW_UPDATE, struct.pack(">II", key, held))
                        held = 0
            elif kind == PING:
                seen["pong"] = stream
            elif kind == GOAWAY:
                seen["goaway"] = struct.unpack(">II", body)
    except Closed:
        pass
    seen["replied"] = [streams[s] for s in spdy.replied]
    seen["ended"] = sorted(ended)
    seen["resets"] = {streams.get(s, s): status for s, status in spdy.resets.items()}
    seen["granted"] = sum(delta for stream, delta in spdy.updates.items() if stream)
    seen["longest"] = longest
    for name, data in received.items():
        seen[name] = text(data) if len(data) < 100000 else {"length": len(data), "crc": zlib.crc32(data)}


def run_portforward(request, seen):
    spdy = Spdy(request["url"], ["portforward.k8s.io"])
    seen["status"] = spdy.status
    if spdy.status != 101:
        return
    connections = []
    for number, wanted in enumerate(request["connections"]):
        headers = {"port": str(wanted["port"])}
        if not wanted.get("no_request_id"):
            headers["requestid"] = str(number)
        error = spdy.open({**headers, "streamtype": "error"})
        spdy.send(error, b"", fin=True)
        data = spdy.open({**headers, "streamtype": "data"})
        connections.append({"error": error, "data": data, "got": b"", "text": b"", "ended": []})
        spdy.send(data, wanted["send"].encode())
        spdy.send(data, b"", fin=True)
    while any(len(c["ended"]) < 2 for c in connections):
        kind, stream, flags, body = spdy.read()
        for connection in connections:
            ends = connection["ended"]
            if kind == "data" and stream == connection["data"]:
                connection["got"] += body
                ends += ["data"] if flags & 1 else []
            elif kind == "data" and stream == connection["error"]:
                connection["text"] += body
                ends += ["error"] if flags & 1 else []
            elif kind == RST_STREAM and stream == connection["data"]:
                ends += ["reset"]
    seen["connections"] = [
        {"got": text(c["got"]), "text": text(c["text"]), "ended": sorted(c["ended"])} for c in connections
    ]


if __name__ == "__main__":
    request, seen = json.loads(sys.argv[1]), {}
    {"exec": run_exec, "portforward": run_portforward}[request["mode"]](request, seen)
    print(json.dumps(seen))
