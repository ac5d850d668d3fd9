package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var doctorCommand = &cli.Command{
	Name:  "doctor",
	Usage: "examine this host: can it run sandboxes, how well are they isolated, and what would make it better",
	Description: "It needs no running server, and changes nothing. What it examines is what 'msb server start' would start\n" +
		"with the same flags. Root sees more than others.\n\n" +
		"Exit codes: 0 all is well, or there are only warnings; 1 a problem keeps sandboxes from running, or the\n" +
		"examination itself failed; 2 bad usage.",
	Flags:  append(passedOnNamed("config", "state-dir", "lib-dir", "host", "port"), runDirFlag, jsonFlag),
	Action: doctor,
}

// doctorTimeout is for programs that are asked for their version, one after the other, and may hang.
const doctorTimeout = time.Minute

// report is what msbd prints of the host, with what a client sees.
type report struct {
	Status string `json:"status"`
	// Isolation is null if sandboxes could not run, or if this user cannot tell.
	Isolation *isolationInfo `json:"isolation"`
	Checks    []check        `json:"checks"`
}

type check struct {
	Name   string `json:"name"`
	Status string `json:"status"` // one of those below
	Detail string `json:"detail"`
	Remedy string `json:"remedy,omitempty"`
}

const (
	fine    = "ok"
	warning = "warning"
	problem = "problem"
)

func (r *report) add(c check) {
	r.Checks = append(r.Checks, c)
	if c.Status == problem || c.Status == warning && r.Status == fine {
		r.Status = c.Status
	}
}

func doctor(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	runDir, err := chooseRunDir(c)
	if err != nil {
		return err
	}
	r, err := examineHost(c, runDir)
	if err != nil {
		r = &report{Status: fine}
		r.add(check{"msbd", problem, err.Error(), "install the msbd that belongs to this msb"})
	}
	examineServer(c.Context, filepath.Join(runDir, socketName), r)
	if c.Bool(jsonFlag.Name) {
		err = printJSON(c, r)
	} else {
		err = printReport(c.App.Writer, r)
	}
	if err == nil && r.Status == problem {
		return cli.Exit("", exitFailure)
	}
	return err
}

// examineHost asks msbd, which need not run for that.
func examineHost(c *cli.Context, runDir string) (*report, error) {
	msbd, err := findMsbd()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(c.Context, doctorTimeout, fmt.Errorf("%s did not end within %v", msbd, doctorTimeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, msbd, append(msbdArgs(c, runDir), "--doctor")...)
	cmd.WaitDelay = time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	r := new(report)
	// A report of a problem comes with an exit code.
	if json.Unmarshal(stdout.Bytes(), r) != nil || len(r.Checks) == 0 {
		return nil, fmt.Errorf("%s says nothing of this host (%v): %s", msbd, err, strings.TrimSpace(stderr.String()))
	}
	return r, nil
}

// examineServer adds what only its client can see.
func examineServer(ctx context.Context, socket string, r *report) {
	const name = "server"
	a := &client.Admin{Socket: socket}
	defer a.Close()
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	st, err := a.Status(ctx)
	switch {
	case errors.Is(err, client.ErrNotRunning):
		r.add(check{name, warning, "not running: nothing listens on " + socket, "msb server start --detach"})
		return
	case errors.Is(err, errdefs.ErrPermissionDenied):
		r.add(check{name, warning, fmt.Sprintf("%s may not use %s", userHere(), socket), permission()})
		return
	case err != nil:
		r.add(check{name, problem, err.Error(), "look into its log"})
		return
	}
	state := fmt.Sprintf("%s, msbd %s, %s (pid %d)", stateName(st), st.GetVersion(), gatewayURL(st), st.GetPid())
	is, would := st.GetIsolation(), r.Isolation
	switch {
	case st.GetState() == degraded:
		r.add(check{name, problem, state + ": " + strings.Join(st.GetDegradedReasons(), "; "), "see 'msb server status'"})
	case st.GetState() != ready:
		r.add(check{name, warning, state, "wait, and see 'msb server status'"})
	case would != nil && is.GetHypervisor() != "" && (is.GetHypervisor() != would.Hypervisor || is.GetAccelerator() != would.Accelerator):
		r.add(check{name, warning, fmt.Sprintf("%s; it began with hypervisor %s and accelerator %s, and would now begin with %s and %s",
			state, is.GetHypervisor(), is.GetAccelerator(), would.Hypervisor, would.Accelerator),
			"msb server stop, then msb server start --detach; sandboxes run on"})
	default:
		r.add(check{Name: name, Status: fine, Detail: state})
	}
	r.add(examineImages(ctx, a))
}

func examineImages(ctx context.Context, a *client.Admin) check {
	const name = "images"
	images, err := a.Images(ctx)
	switch {
	case err != nil:
		return check{name, warning, "not looked at: " + err.Error(), "msb image list, when the server is ready"}
	case len(images) == 0:
		return check{name, warning, "there is none to start a sandbox from", "msb image import FILE"}
	}
	var names []string
	for _, image := range images {
		names = append(names, image.GetName())
	}
	return check{Name: name, Status: fine, Detail: strings.Join(names, ", ")}
}

// permission says how this user gets to use the socket.
func permission() string {
	join := "sudo usermod -aG msb " + userHere()
	if _, err := user.LookupGroup("msb"); err != nil {
		join = "sudo groupadd --system msb && " + join + ", restart the server"
	}
	return "run msb with sudo; or " + join + ", then log in again"
}

func userHere() string {
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return "this user"
}

var colourOf = map[string]colour{fine: green, warning: yellow, problem: red}

// printReport ends with what is to be done, which is what the reader came for. Its commands are not folded, so
// that they can be copied.
func printReport(w io.Writer, r *report) error {
	var out strings.Builder
	name := 0
	count := map[string]int{}
	for _, c := range r.Checks {
		name = max(name, len(c.Name))
		count[c.Status]++
	}
	const status = len(warning)
	for _, c := range r.Checks {
		fmt.Fprintf(&out, "%s  %-*s  %s\n", painted(w, colourOf[c.Status], fmt.Sprintf("%-*s", status, c.Status)), name, printable(c.Name),
			folded(w, printable(c.Detail), status+name+4))
	}
	out.WriteByte('\n')
	for _, line := range verdict(r) {
		fmt.Fprintln(&out, folded(w, printable(line), 2))
	}
	if count[fine] < len(r.Checks) {
		out.WriteString("\nWhat to do:\n")
	}
	for _, severity := range []string{problem, warning} {
		for _, c := range r.Checks {
			if c.Status == severity {
				fmt.Fprintf(&out, "  %-*s  %s\n", name, printable(c.Name), printable(c.Remedy))
			}
		}
	}
	fmt.Fprintf(&out, "\n%d checks: %s, %s\n", len(r.Checks), plural(count[problem], "problem"), plural(count[warning], "warning"))
	_, err := io.WriteString(w, out.String())
	return err
}

// verdict says what stands between a sandbox and this host.
func verdict(r *report) []string {
	i := r.Isolation
	switch {
	case i == nil && r.Status == problem:
		return []string{"Sandboxes cannot run here as configured."}
	case i == nil:
		return []string{"How sandboxes would be isolated, only root can tell."}
	}
	boundary := "Sandboxes are isolated by the processor's virtualisation, which is for production."
	if i.Accelerator != "kvm" {
		boundary = "Sandboxes run emulated, without a hardware boundary, which is for development."
	}
	return []string{boundary, "Accelerator " + because(i.Accelerator, i.Reason), "Hypervisor " + because(i.Hypervisor, i.HypervisorReason)}
}

func plural(n int, what string) string {
	switch n {
	case 0:
		return "no " + what
	case 1:
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
