package rpc

import (
	"context"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/name"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/wire"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// declare returns every method of the server.
func (s *Service) declare() []method {
	return []method{
		define(rpc.MethodSandboxStart, keys.ScopeStart, s.start),
		define(rpc.MethodSandboxStop, keys.ScopeStop, s.stop),
		defineAllNamespaces(rpc.MethodSandboxList, keys.ScopeRead, s.list),
		define(rpc.MethodSandboxGet, keys.ScopeRead, s.get),
		defineAllNamespaces(rpc.MethodSandboxMetricsGet, keys.ScopeRead, s.getMetrics),
		define(rpc.MethodSandboxReplRun, keys.ScopeExec, s.runCode).with(optionalEvents),
		define(rpc.MethodSandboxReplInterrupt, keys.ScopeExec, s.interruptCode),
		define(rpc.MethodSandboxCommandRun, keys.ScopeExec, s.runCommand).with(optionalEvents),
		define(rpc.MethodContextCreate, keys.ScopeExec, s.createContext),
		define(rpc.MethodContextList, keys.ScopeRead, s.listContexts),
		define(rpc.MethodContextRestart, keys.ScopeExec, s.restartContext),
		define(rpc.MethodContextRemove, keys.ScopeExec, s.removeContext),
		define(rpc.MethodProcessStart, keys.ScopeExec, s.startProcess),
		define(rpc.MethodProcessList, keys.ScopeRead, s.listProcesses),
		define(rpc.MethodProcessGet, keys.ScopeRead, s.getProcess),
		define(rpc.MethodProcessWait, keys.ScopeExec, s.waitForProcess),
		define(rpc.MethodProcessSignal, keys.ScopeExec, s.signalProcess),
		define(rpc.MethodProcessInput, keys.ScopeExec, s.writeInput),
		define(rpc.MethodProcessResize, keys.ScopeExec, s.resizeTerminal),
		define(rpc.MethodProcessLogs, keys.ScopeRead, s.readLogs), // not as events: a slow client would make the process wait
		define(rpc.MethodProcessConnect, keys.ScopeExec, s.connectProcess).with(requiredEvents),
		define(rpc.MethodFSRead, keys.ScopeFiles, s.readFile),
		define(rpc.MethodFSWrite, keys.ScopeFiles, s.writeFile),
		define(rpc.MethodFSList, keys.ScopeFiles, s.listFiles),
		define(rpc.MethodFSStat, keys.ScopeFiles, s.statFile),
		define(rpc.MethodFSExists, keys.ScopeFiles, s.fileExists),
		define(rpc.MethodFSMkdir, keys.ScopeFiles, s.makeDirectory),
		define(rpc.MethodFSMove, keys.ScopeFiles, s.moveFile),
		define(rpc.MethodFSRemove, keys.ScopeFiles, s.removeFile),
		define(rpc.MethodFSWatch, keys.ScopeFiles, s.watchFiles).with(requiredEvents),
	}
}

func (s *Service) start(ctx context.Context, c *call, namespace string, p rpc.StartParams) (string, error) {
	var req sandbox.Request
	if config := p.Config; config != nil {
		if err := checkSupported(config); err != nil {
			return "", err
		}
		req = sandbox.Request{
			Image: config.Image, MemoryMiB: config.Memory, DiskMiB: config.Disk, Env: config.Envs,
			Workdir: config.Workdir, User: config.User, Hostname: config.Hostname,
		}
		if config.CPUs != nil {
			// Clients round fractions of a processor down, so 0 means 1.
			req.CPUs = *config.CPUs
			if req.CPUs == 0 {
				req.CPUs = 1
			}
		}
	}
	var err error
	n := sandbox.Name{Namespace: namespace, Name: p.Sandbox}
	c.wait(func() { err = s.sandboxes.Start(ctx, n, req) })
	if err != nil {
		return "", err
	}
	if c.header != nil {
		if rec, err := s.sandboxes.Get(n); err == nil && rec.Origin.From != "" {
			c.header.Set(rpc.HeaderStartedFrom, string(rec.Origin.From))
		}
	}
	return fmt.Sprintf("Sandbox %s started successfully", p.Sandbox), nil
}

// checkSupported returns an error if c sets a field that is not supported. Ignoring it silently would start a sandbox
// that lacks something the client asked for.
func checkSupported(c *rpc.SandboxConfig) error {
	for _, m := range []struct {
		name string
		used bool
		hint string
	}{
		{"volumes", len(c.Volumes) > 0, "write files with sandbox.repl.run or sandbox.command.run"},
		{"ports", len(c.Ports) > 0, "the sandbox cannot expose ports"},
		{"depends_on", len(c.DependsOn) > 0, "start the sandboxes in the order of their dependencies"},
		{"shell", c.Shell != "", "name the shell in sandbox.command.run"},
		{"scripts", len(c.Scripts) > 0, "run them with sandbox.command.run"},
		{"exec", c.Exec != "", "run it with sandbox.command.run"},
	} {
		if m.used {
			return fmt.Errorf("config.%s is not supported yet; omit it (%s): %w", m.name, m.hint, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func (s *Service) stop(ctx context.Context, c *call, namespace string, p rpc.StopParams) (string, error) {
	var err error
	c.wait(func() { err = s.sandboxes.Stop(ctx, sandbox.Name{Namespace: namespace, Name: p.Sandbox}) })
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("Sandbox %s stopped successfully", p.Sandbox), nil
}

// list returns one page of the sandboxes. The sandboxes are sorted, so the name of a page's last sandbox says where the next
// page begins, whatever was started or stopped in between.
func (s *Service) list(_ context.Context, _ *call, namespaces []string, p rpc.ListParams) (rpc.ListResult, error) {
	limit := rpc.MaxPage
	if p.Limit != nil {
		if limit = *p.Limit; limit < 1 || limit > rpc.MaxPage {
			return rpc.ListResult{}, fmt.Errorf("limit %d: give a number from 1 to %d: %w", limit, rpc.MaxPage, errdefs.ErrInvalidArgument)
		}
	}
	recs, err := s.sandboxes.ListIn(namespaces)
	if err != nil {
		return rpc.ListResult{}, err
	}
	first := 0
	if p.After != "" {
		found := false
		first, found = slices.BinarySearchFunc(recs, p.After, func(r sandbox.Record, after string) int { return strings.Compare(r.Name.String(), after) })
		if found {
			first++
		}
	}
	page := recs[first:min(first+limit, len(recs))]
	res := rpc.ListResult{Sandboxes: make([]rpc.SandboxInfo, len(page))}
	for i, rec := range page {
		res.Sandboxes[i] = describeSandbox(rec)
	}
	if first+len(page) < len(recs) {
		res.Next = page[len(page)-1].Name.String()
	}
	return res, nil
}

func (s *Service) get(_ context.Context, _ *call, namespace string, p rpc.GetParams) (rpc.SandboxInfo, error) {
	rec, err := s.sandboxes.Get(sandbox.Name{Namespace: namespace, Name: p.Sandbox})
	if err != nil {
		return rpc.SandboxInfo{}, err
	}
	return describeSandbox(rec), nil
}

// describeSandbox returns what clients may know about a sandbox. The cause of a failure is only for administrators, and the
// environment may contain secrets.
func describeSandbox(rec sandbox.Record) rpc.SandboxInfo {
	info := rpc.SandboxInfo{
		Namespace: rec.Name.Namespace, Name: rec.Name.Name, ID: rec.ID, State: rpc.State(rec.State), Reason: rec.Reason,
		Image: rec.Config.Image, CPUs: rec.Config.CPUs, Memory: rec.Config.MemoryMiB, Disk: rec.Config.DiskMiB,
		CreatedAt: rec.CreatedAt.UTC().Truncate(time.Second),
	}
	if o := rec.Origin; o.From != "" {
		info.StartedFrom = &rpc.StartedFrom{Source: rpc.StartSource(o.From), Why: o.Why}
	}
	return info
}

func (s *Service) getMetrics(ctx context.Context, c *call, namespaces []string, p rpc.MetricsParams) (rpc.MetricsResult, error) {
	var requested string
	if p.Sandbox != nil {
		requested = *p.Sandbox
		if err := name.Validate("sandbox name", requested); err != nil {
			return rpc.MetricsResult{}, err
		}
	}
	var all []sandbox.Metrics
	var err error
	c.wait(func() { all, err = s.sandboxes.Metrics(ctx, namespaces, requested) })
	if err != nil {
		return rpc.MetricsResult{}, err
	}
	res := rpc.MetricsResult{Sandboxes: make([]rpc.SandboxMetrics, len(all))}
	for i, m := range all {
		res.Sandboxes[i] = rpc.SandboxMetrics{
			Namespace: m.Name.Namespace, Name: m.Name.Name,
			State: rpc.State(m.State), Reason: m.Reason, Running: m.State == sandbox.Running,
			CPUUsage: m.CPUPercent, MemoryUsage: m.MemoryMiB, DiskUsage: m.DiskBytes,
		}
	}
	return res, nil
}

func (s *Service) runCommand(ctx context.Context, c *call, namespace string, p rpc.CommandRunParams) (rpc.CommandRunResult, error) {
	timeout, err := parseTimeout(p.Timeout)
	if err != nil {
		return rpc.CommandRunResult{}, err
	}
	command, err := parseCommand(p.Command, p.Args, timeout, p.RunOptions, p.Grace)
	if err != nil {
		return rpc.CommandRunResult{}, err
	}
	n := sandbox.Name{Namespace: namespace, Name: p.Sandbox}
	s.keepOutput(ctx, c, n, p.User)
	f, err := c.run(p.Encoding, func() (sandbox.Process, error) {
		return s.sandboxes.RunCommand(ctx, n, command)
	})
	if err != nil {
		return rpc.CommandRunResult{}, err
	}
	return rpc.CommandRunResult{
		Command: p.Command, Args: p.Args, ExitCode: f.exit.Code, Success: f.exit.Code == 0, Output: f.output,
	}, nil
}

func parseCommand(program string, args []string, timeout time.Duration, o rpc.RunOptions, grace float64) (sandbox.Command, error) {
	if program == "" {
		return sandbox.Command{}, fmt.Errorf("command is empty; name a program to run: %w", errdefs.ErrInvalidArgument)
	}
	options, err := parseRunOptions(o, grace)
	return sandbox.Command{Program: program, Args: args, Timeout: timeout, RunOptions: options}, err
}

func parseRunOptions(o rpc.RunOptions, grace float64) (options sandbox.RunOptions, err error) {
	options = sandbox.RunOptions{Env: o.Envs, Cwd: o.Cwd, User: o.User}
	if options.Input, err = decodeText("stdin", o.Stdin, o.Encoding); err != nil {
		return options, err
	}
	options.Grace, err = wire.Seconds("grace", grace, "to use the default")
	return options, err
}

// decodeText returns the bytes of the param with this name.
func decodeText(name, text string, encoding rpc.Encoding) ([]byte, error) {
	if err := checkEncoding(encoding); err != nil || encoding != rpc.EncodingBase64 {
		return []byte(text), err
	}
	data, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("%s must be base64, as encoding says: %v: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return data, nil
}

func checkEncoding(encoding rpc.Encoding) error {
	switch encoding {
	case "", rpc.EncodingUTF8, rpc.EncodingBase64:
		return nil
	}
	return fmt.Errorf("encoding %q is not supported; use utf-8 or base64: %w", bounded.Short(string(encoding)), errdefs.ErrInvalidArgument)
}

// parseTimeout converts the timeout of a run, in seconds. 0 stands for the server's maximum.
func parseTimeout(seconds float64) (time.Duration, error) {
	return wire.Seconds("timeout", seconds, "to use the server's maximum")
}
