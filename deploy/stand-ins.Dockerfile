# For test_compose.py --stand-ins, on machines that reach Debian and PyPI but no registry of images. Alertmanager is
# Debian's, so an older one than the compose file names. Grafana is a stub: it says that it is healthy, and no more.
FROM debian:bookworm-slim AS alertmanager
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends prometheus-alertmanager \
    && rm -rf /var/lib/apt/lists/* && install -d -o nobody /alertmanager
LABEL maskllm.stand-in=true
USER 65534
VOLUME /alertmanager
ENTRYPOINT ["prometheus-alertmanager"]

FROM debian:bookworm-slim AS grafana
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends busybox && rm -rf /var/lib/apt/lists/* \
    && ln -s busybox /bin/wget && install -d /www/api && echo '{"database": "ok", "version": "stub"}' >/www/api/health
LABEL maskllm.stand-in=true
USER 65534
STOPSIGNAL SIGKILL
ENTRYPOINT ["busybox", "httpd", "-f", "-p", "3000", "-h", "/www"]
