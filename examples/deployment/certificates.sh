#!/usr/bin/env bash
# Make a certificate authority of your own and the SuperLink's certificate, or renew the latter.
#
#   certificates.sh FOLDER [NAME ...]
#
# NAME is every host name or IP address under which devices reach the SuperLink: certificates.sh fleet/ca relay.example.org 10.0.0.5
# (localhost, 127.0.0.1 and ::1 are always in it: the SuperLink's own helper process connects to itself.)
#
#   ca.key      secret; signs certificates. Needed here only: keep it off the SuperLink's machine
#   ca.crt      public; goes to every device, the SuperLink and whoever calls `flwr`
#   server.key  secret; goes to the SuperLink's machine alone
#   server.crt  public; beside server.key
#
# Run it again for other names, or when the certificate has less than 30 days left; what is still good stays.
set -euo pipefail
umask 077

case ${1:---help} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;; esac
mkdir -p "$1" && cd "$1" && shift
names=(localhost 127.0.0.1 ::1 "$@")
new_key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)

is_address() { [[ $1 == *:* || $1 =~ ^[0-9]+(\.[0-9]+){3}$ ]]; }

still_good() { # for 30 days, from our CA, and for all names
  [[ -s server.key && -s server.crt ]] || return 1
  openssl x509 -in server.crt -noout -checkend $((30 * 24 * 3600)) >/dev/null || return 1
  openssl verify -CAfile ca.crt server.crt >/dev/null 2>&1 || return 1
  local name kind
  for name in "${names[@]}"; do
    is_address "$name" && kind=-checkip || kind=-checkhost
    openssl x509 -in server.crt -noout "$kind" "$name" | grep -q 'does match' || return 1
  done
}

if [[ ! -s ca.key ]]; then
  openssl req -x509 "${new_key[@]}" -keyout ca.key -out ca.crt -days 3650 -subj '/CN=fleet CA' \
    -addext 'keyUsage=critical,keyCertSign,cRLSign' 2>/dev/null
  echo "made the certificate authority: $PWD/ca.crt"
fi

if ! still_good; then
  alternatives=
  for name in "${names[@]}"; do
    is_address "$name" && kind=IP || kind=DNS
    alternatives+="${alternatives:+,}$kind:$name"
  done
  printf '%s\n' "subjectAltName=$alternatives" 'basicConstraints=critical,CA:FALSE' 'keyUsage=critical,digitalSignature' \
    'extendedKeyUsage=serverAuth' 'subjectKeyIdentifier=hash' 'authorityKeyIdentifier=keyid' >extensions
  openssl req -new "${new_key[@]}" -keyout server.key -out request -subj '/CN=SuperLink' 2>/dev/null
  openssl x509 -req -in request -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -sha256 -extfile extensions \
    -out server.crt 2>/dev/null
  rm extensions request
  echo "made the SuperLink's certificate for $alternatives: $PWD/server.crt"
fi
openssl verify -x509_strict -CAfile ca.crt server.crt >/dev/null
chmod 644 ca.crt server.crt
