"""Holds manifests against the schemas of Kubernetes and the published models of JobSet and Kubeflow Trainer.

    python k8s_check.py FILE.yaml...

Core kinds: strict schemas (kubernetes-validate). JobSet, TrainJob, TrainingRuntime: through the models of kubeflow-trainer-api and
back, key by key, because the models drop keys that they do not know and say nothing; and the job templates in them as Jobs, strict.
Before that, each check is shown faults that it must find.
"""

import copy
import sys

import kubernetes_validate
import yaml
from kubeflow_trainer_api import models

VERSION = "1.36"
MODELS = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}
# Neither package has them: cert-manager, the Prometheus operator, Kueue.
UNKNOWN = {"Issuer", "Certificate", "PodMonitor", "LocalQueue"}


def keys(value, path=""):
    """Every key of a value, with its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{path}.{key}"
            yield from keys(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from keys(inner, f"{path}[{place}]")


def plain(value):
    """A model's dictionary without what the models wrap (quantities, integers or texts)."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value


def lost(document):
    """Keys of a JobSet, TrainJob or TrainingRuntime that its published model does not know."""
    back = plain(MODELS[document["kind"]].from_dict(copy.deepcopy(document)).to_dict())
    return sorted(set(keys(document)) - set(keys(back)))


def strict(document):
    kubernetes_validate.validate(document, VERSION, strict=True)


def job_templates(document):
    """The jobs of a set, as Jobs of their own."""
    spec = document["spec"]
    if document["kind"] == "TrainingRuntime":
        spec = spec["template"]["spec"]
    for job in spec.get("replicatedJobs", []):
        template = job["template"]
        metadata = {"name": job["name"], **template.get("metadata", {})}
        yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": template["spec"]}


def expect_refused(what, check):
    try:
        found = check()
    except Exception:  # each package has its own errors
        found = True
    assert found, f"the check does not see {what}"


def prove(document):
    """The checks can fail."""
    for place in ["spec", "spec.replicatedJobs.1", "spec.failurePolicy", "spec.replicatedJobs.0.dependsOn"]:
        broken = copy.deepcopy(document)
        target = broken
        for key in place.split("."):
            target = target[int(key)] if key.isdigit() else target.setdefault(key, {})
        if isinstance(target, dict):
            target["inventedKey"] = "x"
            expect_refused(f"a key that was made up at {place}", lambda broken=broken: lost(broken))
    job = next(iter(job_templates(copy.deepcopy(document))))
    job["spec"]["template"]["spec"]["containers"][0]["imagePullPolicies"] = "Always"
    expect_refused("a key that was made up in a container", lambda: strict(job))


def main(files):
    counts, failed, proved = {}, 0, False
    for file in files:
        with open(file) as text:
            documents = [document for document in yaml.safe_load_all(text) if document]
        for document in documents:
            kind = document["kind"]
            name = f"{file.rsplit('/', 1)[-1]}: {kind} {document['metadata']['name']}"
            if kind == "JobSet" and not proved:
                prove(document)
                proved = True
            try:
                if kind in MODELS:
                    missing = lost(document)
                    assert not missing, f"the published model does not know {missing}"
                    for job in job_templates(document):
                        strict(job)
                elif kind in UNKNOWN:
                    pass
                else:
                    strict(document)
            except Exception as error:  # each package has its own errors
                failed += 1
                print(f"REFUSED {name}: {error}")
            counts[kind] = counts.get(kind, 0) + 1
    assert proved, "no JobSet"
    checked = {kind: count for kind, count in sorted(counts.items()) if kind not in UNKNOWN}
    print(f"valid  Kubernetes {VERSION}, strict, and JobSet and Trainer key by key: " + ", ".join(f"{count} {kind}" for kind, count in checked.items()))
    skipped = {kind: count for kind, count in sorted(counts.items()) if kind in UNKNOWN}
    print("not checked, no published models: " + ", ".join(f"{count} {kind}" for kind, count in skipped.items()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
