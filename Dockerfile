# daybreak on a CPU: docker build -t daybreak .   docker run --rm -it -v "$PWD:/work" daybreak train tiny
# On GPUs (never built here): docker build --build-arg EXTRAS=gpu,data,serve --build-arg INDEX=https://pypi.org/simple ...
FROM python:3.11-slim
ARG EXTRAS=data,serve
ARG INDEX=https://download.pytorch.org/whl/cpu
# Triton compiles its launchers with a C compiler.
RUN case ",$EXTRAS," in *,gpu,*) apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* ;; esac
WORKDIR /opt/daybreak
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY daybreak daybreak
COPY scripts scripts
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "$INDEX" ".[$EXTRAS]"
# Not root. With --user "$(id -u):$(id -g)" the runs belong to you; every user may write to this home, for caches.
ENV HOME=/home/daybreak USER=daybreak
RUN useradd --create-home daybreak && chmod 1777 /home/daybreak
USER daybreak
# Data sets and runs appear in the folder that is mounted here.
WORKDIR /work
ENTRYPOINT ["daybreak"]
CMD ["--help"]
