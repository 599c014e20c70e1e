"""Signs in at Dermflow with Authlib, a client library that is not ours.

    authlib_client.py --libs DIR keys FOLDER              makes key pairs, writes the public ones as JWK
    authlib_client.py --libs DIR sign-in URL CA FOLDER CLIENT_ID   reads the secret from standard input

Prints one JSON document with what came of each way to sign in.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, sys.argv[sys.argv.index("--libs") + 1])
ARGUMENTS = [word for at, word in enumerate(sys.argv[1:], 1) if "--libs" not in (word, sys.argv[at - 1])]

from authlib.integrations.requests_client import OAuth2Session  # noqa: E402
from authlib.oauth2.rfc7523 import PrivateKeyJWT  # noqa: E402
from cryptography.hazmat.primitives import serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec, rsa  # noqa: E402
from joserfc.jwk import ECKey, RSAKey  # noqa: E402

ALGORITHMS = {"ES384": ECKey, "RS384": RSAKey}


class BackendServices(PrivateKeyJWT):
    """SMART Backend Services allow an assertion five minutes; Authlib gives it an hour unless told."""

    def sign(self, auth, token_endpoint):
        # Authlib adds a fresh `jti` to what is a fresh dictionary only.
        self.claims = {"exp": int(time.time()) + 240}
        return super().sign(auth, token_endpoint)


def make_keys(folder):
    made = {"ES384": ec.generate_private_key(ec.SECP384R1()), "RS384": rsa.generate_private_key(65537, 3072)}
    for algorithm, key in made.items():
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / f"{algorithm}.pem").write_bytes(pem)
        public = ALGORITHMS[algorithm].import_key(pem).as_dict(private=False)
        (folder / f"{algorithm}.jwk").write_text(json.dumps({**public, "kid": algorithm}))


def sign_in(url, ca, folder, client_id, secret):
    metadata = OAuth2Session(None, None).get(f"{url}/.well-known/oauth-authorization-server", verify=ca, withhold_token=True).json()
    endpoint, outcomes = metadata["token_endpoint"], {}

    def session(method, credential):
        made = OAuth2Session(client_id, credential, token_endpoint_auth_method=method)
        made.verify = ca
        # A bundle that the environment names would take precedence.
        made.trust_env = False
        return made

    sessions = {way: session(way, secret) for way in ("client_secret_basic", "client_secret_post")}
    for algorithm in ALGORITHMS:
        key = ALGORITHMS[algorithm].import_key((folder / f"{algorithm}.pem").read_bytes())
        assertion = BackendServices(endpoint, alg=algorithm, headers={"kid": algorithm})
        made = session("private_key_jwt", key)
        made.register_client_auth_method(assertion)
        sessions[algorithm] = made
    for way, made in sessions.items():
        token = made.fetch_token(endpoint, grant_type="client_credentials", scope="system/DiagnosticReport.rs")
        jobs = made.get(f"{url}/jobs")
        about = made.introspect_token(metadata["introspection_endpoint"], token=token["access_token"])
        outcomes[way] = {"scope": token["scope"], "jobs": jobs.status_code, "about": about.json()}

    made = sessions["client_secret_basic"]
    first = made.fetch_token(endpoint, grant_type="client_credentials", scope="system/DiagnosticReport.rs offline_access")
    second = made.refresh_token(endpoint, refresh_token=first["refresh_token"])
    revoked = made.revoke_token(metadata["revocation_endpoint"], token=second["access_token"])
    about = made.introspect_token(metadata["introspection_endpoint"], token=second["access_token"])
    outcomes["refresh"] = {
        "rotated": first["refresh_token"] != second["refresh_token"],
        "revoked": revoked.status_code,
        "about": about.json(),
    }
    return outcomes


if ARGUMENTS[0] == "keys":
    make_keys(Path(ARGUMENTS[1]))
else:
    _, url, ca, folder, client_id = ARGUMENTS
    print(json.dumps(sign_in(url, ca, Path(folder), client_id, sys.stdin.readline().strip())))
