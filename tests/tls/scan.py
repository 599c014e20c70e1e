"""Scans a TLS server with SSLyze, and prints as JSON what it does not keep of Mozilla's intermediate configuration, by
criterion, and which versions of TLS it accepts."""

import argparse
import json
import sys


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--libs", required=True, help="folder with the packages of requirements.txt")
    parser.add_argument("port", type=int)
    args = parser.parse_args()
    sys.path.insert(0, args.libs)

    from sslyze import Scanner, ServerNetworkLocation, ServerScanRequest
    from sslyze.mozilla_tls_profile.tls_config_checker import (
        SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER,
        MozillaTlsConfiguration,
        ServerNotCompliantWithTlsConfiguration,
        TlsConfigurationEnum,
        check_server_against_tls_configuration,
    )

    scanner = Scanner()
    location = ServerNetworkLocation(hostname="localhost", port=args.port, ip_address="127.0.0.1")
    scanner.queue_scans([ServerScanRequest(location, scan_commands=SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER)])
    (found,) = scanner.get_results()
    try:
        wanted = MozillaTlsConfiguration.get(TlsConfigurationEnum.MOZILLA_INTERMEDIATE)
        check_server_against_tls_configuration(found, wanted)
        issues = {}
    except ServerNotCompliantWithTlsConfiguration as error:
        issues = error.issues
    versions = ["ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1", "tls_1_2", "tls_1_3"]
    suites = {version: getattr(found.scan_result, f"{version}_cipher_suites").result for version in versions}
    accepted = {version: len(found.accepted_cipher_suites) for version, found in suites.items()}
    print(json.dumps({"issues": issues, "accepted": accepted}))


main()
