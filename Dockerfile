# daybreak on a CPU: docker build -t daybreak .   docker run --rm -it -v "$PWD:/work" daybreak train tiny
FROM python:3.11-slim
WORKDIR /opt/daybreak
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY daybreak daybreak
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu '.[data,serve]'
# Data sets and runs appear in the folder that is mounted here.
WORKDIR /work
ENTRYPOINT ["daybreak"]
CMD ["--help"]
