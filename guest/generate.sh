# Sourced by scripts/generate, from the root of the repository: the guest's stubs.
gobin=$(mktemp -d)
GOBIN=$gobin go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
GOBIN=$gobin go install connectrpc.com/connect/cmd/protoc-gen-connect-go@v1.21.1
for proto in envd/process/process.proto envd/filesystem/filesystem.proto; do
    PATH="$gobin:$PATH" "$tools/bin/python" -m grpc_tools.protoc --proto_path=proto \
        --go_out=guest --go_opt=module=sandmartin.dev/guest \
        --connect-go_out=guest --connect-go_opt=module=sandmartin.dev/guest "$proto"
done
rm -rf "$gobin"
