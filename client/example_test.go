package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

// server returns a server that answers the calls of the examples as msbd does.
func server() *httptest.Server {
	answers := map[string]string{
		rpc.MethodSandboxStart:      `"result":"Sandbox my-env started successfully"`,
		rpc.MethodSandboxStop:       `"error":{"code":-32003,"message":"sandbox default/nope does not exist"}`,
		rpc.MethodSandboxReplRun:    `"result":{"status":"success","language":"python","output":[{"stream":"stdout","text":"42"}]}`,
		rpc.MethodSandboxCommandRun: `"result":{"command":"sh","args":["-c","echo hello; exit 3"],"exit_code":3,"success":false,"output":[{"stream":"stdout","text":"hello"}]}`,
		rpc.MethodSandboxList:       `"result":{"sandboxes":[{"namespace":"default","name":"my-env","id":"1f0c9a2b5d6e7f803a4b","state":"failed","reason":"its start failed","image":"microsandbox/python","cpus":1,"memory":512,"created_at":"2026-01-02T03:04:05Z"}]}`,
		rpc.MethodSandboxMetricsGet: `"result":{"sandboxes":[{"namespace":"default","name":"my-env","state":"running","running":true,"cpu_usage":1.25,"memory_usage":61,"disk_usage":16384}]}`,
	}
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Request-Id", "OC5JVGYRCJOXYK5Y")
		for method, answer := range answers {
			if strings.Contains(string(body), `"`+method+`"`) {
				if strings.Contains(answer, `"error"`) {
					w.WriteHeader(http.StatusNotFound)
				}
				fmt.Fprintf(w, `{"jsonrpc":"2.0",%s,"id":1}`, answer)
			}
		}
	}))
}

// Start a sandbox, run code in it, and stop it. Variables keep their values between runs.
func Example() {
	server := server()
	defer server.Close()
	ctx := context.Background()

	// A program would call client.LoadConfig instead.
	c := &client.Client{ServerURL: server.URL, Key: client.NewKey("your-api-key-here")}

	sb := c.Sandbox("", "my-env")
	if err := sb.Start(ctx, nil); err != nil {
		log.Fatal(err)
	}
	defer func() { _ = sb.Stop(ctx) }()

	res, err := sb.RunCode(ctx, "python", "x = 6 * 7\nx", 10*time.Second)
	if err != nil {
		log.Fatal(err)
	}
	for _, line := range res.Output {
		fmt.Println(line.Text)
	}
	// Output: 42
}

// Use the server and the key from the environment, a .env file, or the user's configuration file.
func ExampleLoadConfig() {
	config, err := client.LoadConfig("")
	if err != nil {
		log.Fatal(err)
	}
	c := config.Client()
	if err := c.Health(context.Background()); err != nil {
		log.Fatalf("%s (from %s): %v", config.ServerURL, config.ServerFrom, err)
	}
}

func ExampleSandbox_Start() {
	server := server()
	defer server.Close()
	c := &client.Client{ServerURL: server.URL, Key: client.NewKey("your-api-key-here")}

	err := c.Sandbox("team-alpha", "my-env").Start(context.Background(), &rpc.SandboxConfig{
		Image:  "microsandbox/node",
		Memory: 1024, // MiB
		CPUs:   new(2),
		Envs:   []string{"STAGE=test"},
	})
	fmt.Println(err)
	// Output: <nil>
}

func ExampleSandbox_RunCommand() {
	server := server()
	defer server.Close()
	c := &client.Client{ServerURL: server.URL, Key: client.NewKey("your-api-key-here")}

	res, err := c.Sandbox("", "my-env").RunCommand(context.Background(), "sh", []string{"-c", "echo hello; exit 3"}, time.Minute)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(res.ExitCode, res.Output[0].Text)
	// Output: 3 hello
}

func ExampleClient_ListSandboxes() {
	server := server()
	defer server.Close()
	c := &client.Client{ServerURL: server.URL, Key: client.NewKey("your-api-key-here")}

	sandboxes, err := c.ListSandboxes(context.Background(), rpc.AllNamespaces)
	if err != nil {
		log.Fatal(err)
	}
	for _, s := range sandboxes {
		fmt.Printf("%s/%s: %s: %s\n", s.Namespace, s.Name, s.State, s.Reason)
	}
	// Output: default/my-env: failed: its start failed
}

func ExampleClient_Metrics() {
	server := server()
	defer server.Close()
	c := &client.Client{ServerURL: server.URL, Key: client.NewKey("your-api-key-here")}

	sandboxes, err := c.Metrics(context.Background(), rpc.AllNamespaces)
	if err != nil {
		log.Fatal(err)
	}
	for _, m := range sandboxes {
		if m.Running {
			fmt.Printf("%s/%s: %.2f %% of a CPU, %d MiB\n", m.Namespace, m.Name, *m.CPUUsage, *m.MemoryUsage)
		}
	}
	// Output: default/my-env: 1.25 % of a CPU, 61 MiB
}

// An error has a class, and the details that the server sent.
func ExampleError() {
	server := server()
	defer server.Close()
	c := &client.Client{ServerURL: server.URL, Key: client.NewKey("your-api-key-here")}

	err := c.Sandbox("", "nope").Stop(context.Background())
	if errors.Is(err, errdefs.ErrNotFound) {
		fmt.Println("not found")
	}
	if e, ok := errors.AsType[*client.Error](err); ok {
		fmt.Println(e.Code, e.Status, e.RequestID, e)
	}
	// Output:
	// not found
	// -32003 404 OC5JVGYRCJOXYK5Y sandbox default/nope does not exist
}
