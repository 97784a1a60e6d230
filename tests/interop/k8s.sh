#!/usr/bin/env bash
# Holds the manifests of k8s/ and those that `weightcast k8s render` prints against other people's tools: kubectl's kustomize, the
# schemas of Kubernetes 1.36 (strict), and the published models of JobSet and Kubeflow Trainer.
#
#   tests/interop/k8s.sh            WEIGHTCAST=<binary> to test another one than target/{release,debug}/weightcast
#
# Needs kubectl, and python3 (3.11 or later) with venv; makes a virtual environment in .interop-k8s of the repository (git-ignored;
# kept for the next run) from PyPI.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
repository=$(cd "$here/../.." && pwd)
environment=${K8S_ENVIRONMENT:-$repository/.interop-k8s}
packages=(kubernetes-validate==1.37.0 kubeflow-trainer-api==2.3.0 PyYAML==6.0.3)

binary() {
  local candidate
  for candidate in "${WEIGHTCAST:-}" "$repository/target/release/weightcast" "$repository/target/debug/weightcast"; do
    [ -n "$candidate" ] && [ -x "$candidate" ] && { echo "$candidate"; return; }
  done
  echo "no weightcast binary: cargo build first, or set WEIGHTCAST" >&2
  return 1
}

built=$(binary)
if [ ! -e "$environment/installed-${packages[0]}-${packages[1]}" ]; then
  echo "installing ${packages[*]} into $environment"
  rm -rf "$environment"
  python3 -m venv "$environment"
  timeout 600 "$environment/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
  touch "$environment/installed-${packages[0]}-${packages[1]}"
fi
work=$(mktemp -d "${TMPDIR:-/tmp}/weightcast-k8s.XXXXXX")
trap 'rm -rf "$work"' EXIT
# A copy: a build that goes on meanwhile does not change what is tested, and the token's file is not put into the repository.
cp "$built" "$work/weightcast"
cp -r "$repository/k8s" "$work/k8s"
echo "a token of the test" >"$work/k8s/components/token/token"
failed=0

# render FLAGS…: the job of the base.
render() {
  local base=(--namespace weightcast --create-namespace --image weightcast:0.1.0 --mount weightcast-data=/data:ro)
  [[ " $* " == *" --nodes "* ]] || base+=(--nodes 2)
  "$work/weightcast" k8s render "$repository/k8s/job.toml" --here "/data=$repository/tests/data" --gpus-per-node 8 \
    "${base[@]}" "$@" 2>/dev/null
}

# same NAME FLAGS…: what kubectl makes of a kustomization is what the flags render.
same() {
  local name=$1
  shift
  local differences
  if differences=$(render "$@" --diff --against "$work/$name.yaml"); then
    echo "same   $name: kubectl kustomize = weightcast k8s render $*"
  else
    # A queue and a Secret that a component brings along are nobody else's.
    differences=$(grep -v -e '^- LocalQueue ' -e '^- Secret ' <<<"$differences" || true)
    if [ -z "$differences" ]; then
      echo "same   $name: kubectl kustomize = weightcast k8s render $*, and what the component alone has"
    else
      echo "DIFFERS $name: $*"
      echo "$differences"
      failed=1
    fi
  fi
}

# build NAME DIRECTORY
build() {
  if kubectl kustomize "$2" >"$work/$1.yaml" 2>"$work/error"; then
    echo "built  $1: $(grep -c '^kind:' "$work/$1.yaml") objects"
  else
    echo "FAILED $1: $(cat "$work/error")"
    failed=1
  fi
}

build base "$work/k8s/base"
same base
declare -A flags=([kueue]="--queue weightcast" [cert-manager]=--tls [monitoring]=--monitoring [network-policy]=--network-policy
  [indexed-job]="--flavor indexed-job" [kubeflow-trainer]="--flavor trainjob" [token]="")
for component in kueue cert-manager monitoring network-policy indexed-job kubeflow-trainer token; do
  mkdir "$work/k8s/with-$component"
  printf 'resources: [../base]\ncomponents: [../components/%s]\n' $component >"$work/k8s/with-$component/kustomization.yaml"
  build "with-$component" "$work/k8s/with-$component"
  # shellcheck disable=SC2086
  same "with-$component" ${flags[$component]}
done
for overlay in one-node several-nodes cpu-smoke; do
  build $overlay "$work/k8s/overlays/$overlay"
done
same one-node --nodes 1
same several-nodes --nodes 4 --queue weightcast --tls --monitoring --network-policy

for flavor in jobset indexed-job trainjob; do
  render --flavor $flavor --tls --monitoring --network-policy --queue team >"$work/rendered-$flavor.yaml" || failed=1
done
"$environment/bin/python" "$here/k8s_check.py" "$work"/*.yaml || failed=1
exit $failed
