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
	Name:      "doctor",
	Usage:     "check whether this host can run sandboxes and how well they are isolated",
	UsageText: "msb doctor [options]",
	Description: "Each problem and each warning comes with what to do about it. The server need not be running, and nothing is\n" +
		"changed. With options of 'msb server start', msb checks what that command would start. Some checks need root.\n\n" +
		"Exit codes: 0 no problem, though perhaps warnings; 1 a problem, or the check itself failed; 2 invalid usage.",
	Flags:  append(msbdFlagsNamed("config", "state-dir", "lib-dir", "host", "port"), runDirFlag, jsonFlag),
	Action: doctor,
}

// doctorTimeout limits the checks of msbd. It runs several programs for their versions, and each may hang.
const doctorTimeout = time.Minute

// report is the report that msbd prints about the host, with the checks that msb adds.
type report struct {
	Status string `json:"status"`
	// Isolation is null if sandboxes could not run, or if it takes root to find out.
	Isolation *isolationInfo `json:"isolation"`
	Checks    []check        `json:"checks"`
}

type check struct {
	Name   string `json:"name"`
	Status string `json:"status"` // one of the constants below
	Detail string `json:"detail"`
	Remedy string `json:"remedy,omitempty"`
}

// The values of Status. The Status of a report is the worst of its checks.
const (
	statusOK      = "ok"
	statusWarning = "warning"
	statusProblem = "problem"
)

func (r *report) add(c check) {
	r.Checks = append(r.Checks, c)
	if c.Status == statusProblem || c.Status == statusWarning && r.Status == statusOK {
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
		r = &report{Status: statusOK}
		r.add(check{"msbd", statusProblem, err.Error(), "install the msbd that belongs to this msb"})
	}
	examineServer(c.Context, filepath.Join(runDir, socketName), r)
	if c.Bool(jsonFlag.Name) {
		err = printJSON(c, r)
	} else {
		err = printReport(c.App.Writer, r)
	}
	if err == nil && r.Status == statusProblem {
		return cli.Exit("", exitFailure)
	}
	return err
}

// examineHost runs msbd --doctor and returns its report. No server need be running.
func examineHost(c *cli.Context, runDir string) (*report, error) {
	msbd, err := findMsbd()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(c.Context, doctorTimeout, fmt.Errorf("%s --doctor did not exit within %v", msbd, doctorTimeout))
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
	// msbd exits with an error code if it reports a problem, so err alone does not mean that there is no report.
	if json.Unmarshal(stdout.Bytes(), r) != nil || len(r.Checks) == 0 {
		return nil, fmt.Errorf("%s --doctor printed no report (%v): %s", msbd, err, strings.TrimSpace(stderr.String()))
	}
	return r, nil
}

// examineServer adds the checks that need a connection to the running server.
func examineServer(ctx context.Context, socket string, r *report) {
	const name = "server"
	a := &client.Admin{Socket: socket}
	defer a.Close()
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	st, err := a.Status(ctx)
	switch {
	case errors.Is(err, client.ErrNotRunning):
		r.add(check{name, statusWarning, "not running: nothing listens on " + socket, "msb server start --detach"})
		return
	case errors.Is(err, errdefs.ErrPermissionDenied):
		r.add(check{name, statusWarning, fmt.Sprintf("%s may not use %s", currentUser(), socket), "run msb with sudo; or join the group msb: " + client.JoinGroup()})
		return
	case err != nil:
		r.add(check{name, statusProblem, err.Error(), "see the server's log"})
		return
	}
	state := fmt.Sprintf("%s, msbd %s, %s (pid %d)", stateName(st), st.GetVersion(), gatewayURL(st), st.GetPid())
	current, configured := st.GetIsolation(), r.Isolation
	switch {
	case st.GetState() == degraded:
		r.add(check{name, statusProblem, state + ": " + strings.Join(st.GetDegradedReasons(), "; "), "see 'msb server status'"})
	case st.GetState() != ready:
		r.add(check{name, statusWarning, state, "wait, then see 'msb server status'"})
	case configured != nil && current.GetHypervisor() != "" && (current.GetHypervisor() != configured.Hypervisor || current.GetAccelerator() != configured.Accelerator):
		r.add(check{name, statusWarning, fmt.Sprintf("%s; it was started with hypervisor %s and accelerator %s, and would now start with %s and %s",
			state, current.GetHypervisor(), current.GetAccelerator(), configured.Hypervisor, configured.Accelerator),
			"msb server stop, then msb server start --detach; sandboxes keep running"})
	default:
		r.add(check{Name: name, Status: statusOK, Detail: state})
	}
	r.add(examineImages(ctx, a))
}

func examineImages(ctx context.Context, a *client.Admin) check {
	const name = "images"
	images, err := a.Images(ctx)
	switch {
	case err != nil:
		return check{name, statusWarning, "not checked: " + err.Error(), "msb image list, when the server is ready"}
	case len(images) == 0:
		return check{name, statusWarning, "there is no image to start a sandbox from", "msb image import FILE"}
	}
	var names []string
	for _, image := range images {
		names = append(names, image.GetName())
	}
	return check{Name: name, Status: statusOK, Detail: strings.Join(names, ", ")}
}

func currentUser() string {
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return "this user"
}

var statusColor = map[string]color{statusOK: green, statusWarning: yellow, statusProblem: red}

// printReport prints the checks, a summary, and what to do, which comes last because it matters most to the reader.
// Commands are not wrapped, so that they can be copied.
func printReport(w io.Writer, r *report) error {
	var out strings.Builder
	name := 0
	count := map[string]int{}
	for _, c := range r.Checks {
		name = max(name, len(c.Name))
		count[c.Status]++
	}
	const status = len(statusWarning)
	for _, c := range r.Checks {
		fmt.Fprintf(&out, "%s  %-*s  %s\n", colored(w, statusColor[c.Status], fmt.Sprintf("%-*s", status, c.Status)), name, printable(c.Name),
			wrapped(w, printable(c.Detail), status+name+4))
	}
	out.WriteByte('\n')
	for _, line := range summary(r) {
		fmt.Fprintln(&out, wrapped(w, printable(line), 2))
	}
	if count[statusOK] < len(r.Checks) {
		out.WriteString("\nWhat to do:\n")
	}
	for _, severity := range []string{statusProblem, statusWarning} {
		for _, c := range r.Checks {
			if c.Status == severity {
				fmt.Fprintf(&out, "  %-*s  %s\n", name, printable(c.Name), printable(c.Remedy))
			}
		}
	}
	fmt.Fprintf(&out, "\n%s: %s, %s\n", plural(len(r.Checks), "check", "checks"), plural(count[statusProblem], "problem", "problems"),
		plural(count[statusWarning], "warning", "warnings"))
	_, err := io.WriteString(w, out.String())
	return err
}

// summary describes how sandboxes on this host are isolated.
func summary(r *report) []string {
	i := r.Isolation
	switch {
	case i == nil && r.Status == statusProblem:
		return []string{"Sandboxes cannot run here as configured."}
	case i == nil:
		return []string{"Run msb doctor as root to see how sandboxes would be isolated."}
	}
	boundary := "Hardware virtualization (KVM) isolates each sandbox, as production requires."
	if i.Accelerator != "kvm" {
		boundary = "Sandboxes run emulated, without a hardware boundary. This is for development only."
	}
	return []string{boundary, "Accelerator " + withReason(i.Accelerator, i.Reason), "Hypervisor " + withReason(i.Hypervisor, i.HypervisorReason)}
}
