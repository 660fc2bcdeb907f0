"""aiosmtpd with limits, and a line in a file for each message."""

import asyncio
import base64
import json
import ssl

from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword

with open("/etc/relay/settings.json") as f:
    S = json.load(f)

ledger = open(S["Record"], "ab", buffering=0)
open_sessions = 0


class Handler:
    async def handle_MAIL(self, server, session, envelope, address, options):
        if address.startswith("refused@"):
            return "550 5.7.1 sender refused"
        envelope.mail_from = address  # keeps "<>" if it is null: aiosmtpd takes an empty one for no sender
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.startswith("refused"):
            return "550 5.1.1 no such user"
        if address.startswith("busy"):
            return "450 4.2.1 mailbox busy"
        if len(envelope.rcpt_tos) >= S["MaxRecipients"]:
            return "452 4.5.3 too many recipients"
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        sender = "" if envelope.mail_from == "<>" else envelope.mail_from
        line = {"from": sender, "to": envelope.rcpt_tos,
                "data": base64.b64encode(envelope.original_content).decode()}
        ledger.write(json.dumps(line).encode() + b"\n")
        return "250 2.0.0 OK"


class Relay(SMTP):
    """Refuses the connection beyond the limit, as Postfix does: with 421 instead of a greeting."""

    def connection_made(self, transport):
        global open_sessions
        if self.transport is None:  # not again after STARTTLS
            open_sessions += 1
        super().connection_made(transport)

    def connection_lost(self, error):
        global open_sessions
        open_sessions -= 1
        super().connection_lost(error)

    async def _handle_client(self):
        if open_sessions > S["MaxConns"]:
            await self.push("421 4.7.0 too many connections")
            self.transport.close()
            return
        await super()._handle_client()


def authenticate(server, session, envelope, mechanism, data):
    ok = (isinstance(data, LoginPassword) and data.login.decode() == S["User"]
          and data.password.decode() == S["Password"])
    return AuthResult(success=ok, handled=False)


def tls():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(S["Cert"], S["Key"])
    return context


def factory(**options):
    return lambda: Relay(Handler(), hostname="relay.example", data_size_limit=S["MaxSize"], enable_SMTPUTF8=True,
                         timeout=S["IdleSeconds"], command_call_limit={"MAIL": S["MaxMessages"], "*": 1000000}, **options)


async def main():
    loop = asyncio.get_running_loop()
    await loop.create_server(factory(), "127.0.0.1", S["Plain"])
    await loop.create_server(
        factory(tls_context=tls(), require_starttls=True, authenticator=authenticate, auth_required=True,
                auth_exclude_mechanism=["LOGIN"]), "127.0.0.1", S["StartTLS"])
    await loop.create_server(
        factory(authenticator=authenticate, auth_required=True, auth_require_tls=False,
                auth_exclude_mechanism=["PLAIN"]), "127.0.0.1", S["Implicit"], ssl=tls())
    await asyncio.Event().wait()


asyncio.run(main())
