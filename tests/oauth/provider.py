"""An identity provider that is not ours: Authlib's authorization server, behind TLS on 127.0.0.1.

    provider.py --libs DIR FOLDER

Makes a CA and a certificate in FOLDER, prints one line of JSON with its issuer and the CA's file, and then answers one
line of JSON for each on standard input, at whose end it ends:

    {"do": "rotate"}                            new keys sign; the old ones are published no more
    {"do": "counts"}                            requests so far, by path
    {"do": "live", "seconds": 3}                how long opaque tokens live from now on
    {"do": "sign", "header": {}, "claims": {}}  a token with these changes, null for none; alg HS256 signs with the
                                                public key's PEM, none with nothing, any other with the key of its
                                                kind, whatever that key is said to be for
    {"do": "twin", "token": ""}                 an ES256 token with the other form of its signature
"""

import base64
import datetime
import hashlib
import hmac
import ipaddress
import json
import ssl
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl

sys.path.insert(0, sys.argv[sys.argv.index("--libs") + 1])
FOLDER = Path(sys.argv[-1])

from authlib.common.security import generate_token  # noqa: E402
from authlib.oauth2 import AuthorizationServer  # noqa: E402
from authlib.oauth2.rfc6749 import ClientMixin, OAuth2Request, TokenMixin, grants  # noqa: E402
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload  # noqa: E402
from authlib.oauth2.rfc6750 import BearerTokenGenerator  # noqa: E402
from authlib.oauth2.rfc7009 import RevocationEndpoint  # noqa: E402
from authlib.oauth2.rfc7662 import IntrospectionEndpoint  # noqa: E402
from authlib.oauth2.rfc9068 import JWTBearerTokenGenerator  # noqa: E402
from cryptography import x509  # noqa: E402
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from joserfc.jwk import ECKey, KeySet, RSAKey  # noqa: E402
from joserfc.jws import JWSRegistry  # noqa: E402

AUDIENCE = "https://dermflow.example"
LIFETIME = 3600
# The order of the group of P-256 (SEC 2, section 2.4.2).
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


class Keys:
    """The current key of each algorithm."""

    def __init__(self):
        self.rotate()

    def rotate(self):
        kid = generate_token(8)
        rsa = RSAKey.generate_key(2048, {"kid": f"rsa-{kid}", "use": "sig", "alg": "RS256"})
        curve = ECKey.generate_key("P-256", {"kid": f"ec-{kid}", "use": "sig", "alg": "ES256"})
        self.current = {"RS256": rsa, "ES256": curve}

    def published(self):
        return KeySet(list(self.current.values())).as_dict(private=False)


class Client(ClientMixin):
    def __init__(self, client_id, form, roles):
        self.client_id, self.form, self.roles = client_id, form, roles
        self.secret = generate_token(32)

    def get_client_id(self):
        return self.client_id

    def get_allowed_scope(self, scope):
        return scope or ""

    def check_client_secret(self, client_secret):
        return hmac.compare_digest(self.secret, client_secret)

    def check_endpoint_auth_method(self, method, endpoint):
        return method == "client_secret_basic"

    def check_grant_type(self, grant_type):
        return grant_type == "client_credentials"


class Token(TokenMixin):
    def __init__(self, client, token):
        self.client, self.value, self.revoked = client, token["access_token"], False
        self.issued_at, self.lifetime = int(time.time()), token["expires_in"]

    def check_client(self, client):
        return client is self.client

    def is_expired(self):
        return time.time() > self.issued_at + self.lifetime

    def is_revoked(self):
        return self.revoked


class SignedTokens(JWTBearerTokenGenerator):
    def __init__(self, issuer, algorithm):
        super().__init__(issuer, alg=algorithm, expires_generator=LIFETIME)

    def get_jwks(self):
        return KeySet([KEYS.current[self.alg]])

    def get_audiences(self, client, user, scope):
        return [client.client_id, AUDIENCE]

    def get_extra_claims(self, client, grant_type, user, scope):
        return {"realm": {"roles": client.roles}}


class Request(OAuth2Request):
    def __init__(self, method, uri, headers, fields):
        super().__init__(method, uri, headers=headers)
        self.fields, self.payload = fields, BasicOAuth2Payload(fields)

    args = property(lambda self: {})
    form = property(lambda self: self.fields)


class Server(AuthorizationServer):
    """What a web framework's integration does."""

    def __init__(self, clients):
        super().__init__()
        self.clients, self.tokens = clients, {}

    def query_client(self, client_id):
        return self.clients.get(client_id)

    def save_token(self, token, request):
        self.tokens[token["access_token"]] = Token(request.client, token)

    def create_oauth2_request(self, request):
        return request

    def handle_response(self, status, body, headers):
        return status, body

    def send_signal(self, name, *args, **kwargs):
        pass


class Known:
    def query_token(self, token_string, token_type_hint):
        return self.server.tokens.get(token_string)


class Introspection(Known, IntrospectionEndpoint):
    def check_permission(self, token, client, request):
        return client.client_id == "dermflow"

    def introspect_token(self, token):
        return {
            "active": True,
            "client_id": token.client.client_id,
            "token_type": "Bearer",
            "sub": token.client.client_id,
            "aud": AUDIENCE,
            "iss": ISSUER,
            "iat": token.issued_at,
            "exp": token.issued_at + token.lifetime,
            "realm": {"roles": token.client.roles},
        }


class Revocation(Known, RevocationEndpoint):
    def revoke_token(self, token, request):
        token.revoked = True


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        documents = {
            "/jwks": KEYS.published,
            "/.well-known/openid-configuration": lambda: {"issuer": ISSUER, "jwks_uri": f"{ISSUER}/jwks"},
        }
        self.answer(lambda: (200, documents[self.path]()) if self.path in documents else (404, {}))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        request = Request("POST", ISSUER + self.path, self.headers, dict(parse_qsl(body)))
        ways = {
            "/token": SERVER.create_token_response,
            "/introspect": lambda request: SERVER.create_endpoint_response("introspection", request),
            "/revoke": lambda request: SERVER.create_endpoint_response("revocation", request),
        }
        self.answer(lambda: ways[self.path](request) if self.path in ways else (404, {}))

    def answer(self, make):
        with LOCK:
            COUNTS[self.path] += 1
            status, body = make()
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def certificates():
    """A CA, and what the server shows: the paths of the CA, and of chain and key in one."""
    now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)

    def make(name, signer, signer_name, *extensions):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        made = x509.CertificateBuilder(signer_name or subject, subject, key.public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
        for extension, critical in extensions:
            made = made.add_extension(extension, critical)
        return key, subject, made.sign(signer or key, hashes.SHA256())

    ca_key, ca_name, ca = make("provider CA", None, None, (x509.BasicConstraints(True, 0), True))
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    key, _, leaf = make("localhost", ca_key, ca_name, (x509.SubjectAlternativeName(names), False))
    pem = serialization.Encoding.PEM
    (FOLDER / "provider-ca.pem").write_bytes(ca.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (FOLDER / "provider.pem").write_bytes(leaf.public_bytes(pem) + private)
    return FOLDER / "provider-ca.pem", FOLDER / "provider.pem"


def signed(header, claims):
    """By hand: the library would refuse to make most of what this is for."""
    now = int(time.time())
    full = {"iss": ISSUER, "aud": AUDIENCE, "sub": "device", "iat": now, "exp": now + LIFETIME,
            "jti": generate_token(16), "realm": {"roles": CLIENTS["device"].roles}}
    full = {name: value for name, value in {**full, **claims}.items() if value is not None}
    key = KEYS.current["ES256" if header.get("alg", "").startswith("ES") else "RS256"]
    head = {"alg": "RS256", "typ": "at+jwt", "kid": key.kid, **header}
    body = f"{encoded({name: value for name, value in head.items() if value is not None})}.{encoded(full)}"
    if head["alg"] == "none":
        signature = b""
    elif head["alg"] == "HS256":
        signature = hmac.new(key.as_pem(private=False), body.encode(), hashlib.sha256).digest()
    else:
        signature = JWSRegistry.algorithms[head["alg"]].sign(body.encode(), key)
    return f"{body}.{raw(signature)}"


def twin(token):
    """(r, s) and (r, n - s) are signatures of the same."""
    body, _, signature = token.rpartition(".")
    signature = base64.urlsafe_b64decode(signature + "==")
    other = ORDER - int.from_bytes(signature[32:], "big")
    return f"{body}.{raw(signature[:32] + other.to_bytes(32, 'big'))}"


def raw(some):
    return base64.urlsafe_b64encode(some).rstrip(b"=").decode()


def encoded(value):
    return raw(json.dumps(value).encode())


def command(line):
    asked = json.loads(line)
    if asked["do"] == "rotate":
        KEYS.rotate()
        return {}
    if asked["do"] == "counts":
        return dict(COUNTS)
    if asked["do"] == "live":
        forms["opaque"].expires_generator = asked["seconds"]
        return {}
    if asked["do"] == "twin":
        return {"token": twin(asked["token"])}
    return {"token": signed(asked.get("header", {}), asked.get("claims", {}))}


LOCK, COUNTS, KEYS = threading.Lock(), Counter(), Keys()
CLIENTS = {
    name: Client(name, form, roles)
    for name, form, roles in [
        ("device", "RS256", ["submit"]),
        ("device-ec", "ES256", ["submit"]),
        ("device-opaque", "opaque", ["submit"]),
        ("reader", "RS256", ["audit"]),
        ("dermflow", "opaque", []),
    ]
}
ca, chain = certificates()
listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
tls.load_cert_chain(chain)
# The handshake is for the thread of the connection.
listener.socket = tls.wrap_socket(listener.socket, server_side=True, do_handshake_on_connect=False)
ISSUER = f"https://localhost:{listener.server_address[1]}"

SERVER = Server(CLIENTS)
forms = {algorithm: SignedTokens(ISSUER, algorithm) for algorithm in KEYS.current}
forms["opaque"] = BearerTokenGenerator(lambda **_: generate_token(42), expires_generator=LIFETIME)
SERVER.register_token_generator("default", lambda client, **rest: forms[client.form](client=client, **rest))
SERVER.register_grant(grants.ClientCredentialsGrant)
SERVER.register_endpoint(Introspection)
SERVER.register_endpoint(Revocation)

threading.Thread(target=listener.serve_forever, daemon=True).start()
secrets = {name: client.secret for name, client in CLIENTS.items()}
print(json.dumps({"issuer": ISSUER, "ca": str(ca), "secrets": secrets}), flush=True)
for line in sys.stdin:
    with LOCK:
        answer = command(line)
    print(json.dumps(answer), flush=True)
