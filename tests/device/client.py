#!/usr/bin/env python3
"""A client of the device API, as an integrator has it: standard library only, reads every key, takes only 200.

    client.py --ca CA --url URL --user NAME --password-file FILE IMAGE...

Prints a line of JSON: the first conclusion, and which of the images were not valid. A key that is missing, or a number
that is none, is a traceback.
"""
import argparse
import base64
import datetime
import json
import ssl
import urllib.parse
import urllib.request


def number(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def percent(value):
    if not 0 <= number(value) <= 100:
        raise ValueError(f"{value} is no percentage")
    return value


def whole(value):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value


def text(value):
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def flag(value):
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is no flag")
    return value


def code(json_):
    """Every coding has five keys; two are never null."""
    for coding in json_["coding"] or []:
        text(coding["code"])
        text(coding["systemDisplay"])
        for name in ("display", "system", "version"):
            coding[name] is None or text(coding[name])
    return text(json_["text"])


def confidence(json_):
    percent(json_["value"])
    code(json_["code"])
    json_["interpretation"] is None or text(json_["interpretation"])


def indicators(json_):
    for name in ("hasCondition", "pigmentedLesion", "malignancy", "urgentReferral", "highPriorityReferral"):
        percent(json_[name])


def is_valid(json_):
    flag(json_["quality"]["acceptable"])
    percent(json_["quality"]["score"])
    assert text(json_["quality"]["interpretation"])
    flag(json_["domain"]["isDermatological"])
    confidence(json_["domain"]["additionalData"]["aiConfidence"])
    assert json_["modality"]["value"] in ("None", "Clinical", "Dermoscopic")
    confidence(json_["modality"]["additionalData"]["aiConfidenceClinical"])
    confidence(json_["modality"]["additionalData"]["aiConfidenceDermoscopic"])
    return flag(json_["isValid"])


def image(json_):
    for conclusion in json_["conclusion"]:
        percent(conclusion["probability"])
        code(conclusion["code"])
        if conclusion["explainability"] is not None:
            heat_map = conclusion["explainability"]["heatMap"]
            for name in ("title", "contentType", "colorModel"):
                text(heat_map[name])
            base64.b64decode(heat_map["data"], validate=True)
            assert whole(heat_map["height"]) > 0 and whole(heat_map["width"]) > 0
    percent(json_["performanceIndicator"]["entropy"])
    indicators(json_["clinicalIndicator"])
    return is_valid(json_["mediaValidity"])


def diagnosis(json_):
    assert json_["resourceType"] == "DiagnosticReport" and json_["status"] == "preliminary"
    issued = datetime.datetime.fromisoformat(text(json_["issued"]).replace("Z", "+00:00"))
    assert issued.date() == datetime.datetime.now(datetime.timezone.utc).date()
    assert number(json_["analysisDuration"]) > 0
    text(json_["identifier"]["value"])
    code(json_["code"])
    [code(category) for category in json_["category"]]
    indicators(json_["clinicalIndicator"])
    for name in ("sensitivity", "specificity", "entropy"):
        assert percent(json_["performanceIndicator"][name]) > 0
    conclusions = [(percent(each["probability"]), code(each["code"])) for each in json_["conclusion"]]
    assert conclusions == sorted(conclusions, key=lambda each: -each[0])
    valid = [image(each) for each in json_["imagingAnalysis"]]
    return {
        "first": conclusions[0] if conclusions else None,
        "refused": [n for n, is_good in enumerate(valid) if not is_good],
    }


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    for name in ("--ca", "--url", "--user", "--password-file"):
        arguments.add_argument(name, required=True)
    arguments.add_argument("images", nargs="+")
    given = arguments.parse_args()
    tls = ssl.create_default_context(cafile=given.ca)

    def call(path, data, headers):
        request = urllib.request.Request(given.url.rstrip("/") + "/" + path, data, headers)
        with urllib.request.urlopen(request, context=tls, timeout=180) as answer:
            assert answer.status == 200
            return json.load(answer)

    with open(given.password_file) as file:
        form = urllib.parse.urlencode({"username": given.user, "password": file.read().strip()})
    session = call("login", form.encode(), {"Content-Type": "application/x-www-form-urlencoded"})
    assert session["token_type"] == "Bearer token" and int(session["expires_in_minutes"]) > 0
    bearer = {"Authorization": "Bearer " + session["access_token"]}
    about = call("device-information", None, bearer)
    for value in (about["manufacturer"]["name"], about["manufacturer"]["address"], about["version"][0]["value"],
                  about["name"][0]["value"]):
        assert text(value)
    payload = []
    for path in given.images:
        with open(path, "rb") as file:
            payload.append({"contentAttachment": {"data": base64.b64encode(file.read()).decode()}})
    body = json.dumps({"payload": payload}).encode()
    answer = call("diagnosis-support", body, {"Content-Type": "application/json", "Accept": "*/*", **bearer})
    print(json.dumps(diagnosis(answer)))


if __name__ == "__main__":
    main()
