#!/usr/bin/python3
"""A dice behind HTTP: answers {"dice": N}. It knows nothing of systemd, sockets passed in, or sleeping."""

import argparse
import json
import os
import random
import socket
import socketserver
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Dice(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive
    disable_nagle_algorithm = True

    def setup(self):
        if self.request.family == socket.AF_UNIX:
            self.disable_nagle_algorithm = False
        super().setup()

    def do_GET(self):
        body = json.dumps({"dice": random.randint(1, 6)}).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class TcpServer(ThreadingHTTPServer):
    request_queue_size = 1024


class UnixServer(TcpServer):
    address_family = socket.AF_UNIX

    def server_bind(self):
        if os.path.exists(self.server_address):
            os.unlink(self.server_address)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", 0

    def get_request(self):
        connection, _ = super().get_request()
        return connection, ("localhost", 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="a port on 127.0.0.1, or the path of a unix socket")
    parser.add_argument("--slow-start", type=float, default=0, metavar="SECONDS", help="wait before listening")
    arguments = parser.parse_args()
    time.sleep(arguments.slow_start)
    if arguments.address.startswith("/"):
        server = UnixServer(arguments.address, Dice)
    else:
        server = TcpServer(("127.0.0.1", int(arguments.address)), Dice)
    server.serve_forever()


if __name__ == "__main__":
    main()
