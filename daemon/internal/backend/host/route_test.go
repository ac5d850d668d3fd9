package host

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

var (
	noKVM   = &obstacle{what: "there is no /dev/kvm", fix: "modprobe kvm_amd", fixableHere: true}
	badCPU  = &obstacle{what: "the processor offers neither vmx nor svm", fix: enableNesting}
	noVsock = &obstacle{what: "there is no /dev/vhost-vsock", fix: "modprobe vhost_vsock", fixableHere: true}
)

func TestChoose(t *testing.T) {
	const own = "/kata.toml"
	for name, tt := range map[string]struct {
		survey      survey
		options     Options
		hypervisor  string // name, a colon and the beginning of the reason
		accelerator string
		advice      []string // a part of each item
		err         string   // parts of the error, separated by |
		is          func(error) bool
	}{
		"all usable":    {hypervisor: "builtin: the default", accelerator: "kvm: KVM is usable"},
		"auto, spelled": {options: Options{Hypervisor: "auto", Accelerator: "auto"}, hypervisor: "builtin: the default", accelerator: "kvm: KVM is usable"},
		"no vsock":      {survey: survey{vsock: noVsock}, hypervisor: "builtin: the default", accelerator: "kvm: KVM is usable"},
		"no KVM, no vsock": {survey: survey{kvm: noKVM, vsock: noVsock}, hypervisor: "builtin: the default",
			accelerator: "tcg: KVM is not usable: there is no /dev/kvm", advice: []string{"modprobe kvm_amd"}},
		"no virtualization": {survey: survey{kvm: badCPU, vsock: noVsock}, hypervisor: "builtin: the default",
			accelerator: "tcg: KVM is not usable: the processor", advice: []string{enableNesting}},
		"accelerator kvm":              {options: Options{Accelerator: KVM}, hypervisor: "builtin: the default", accelerator: "kvm: configured"},
		"accelerator kvm, and missing": {survey: survey{kvm: noKVM}, options: Options{Accelerator: KVM}, err: "KVM is not usable: there is no /dev/kvm; to fix it: modprobe kvm_amd", is: errdefs.IsFailedPrecondition},
		"tcg": {options: Options{Accelerator: TCG}, hypervisor: "builtin: the default", accelerator: "tcg: configured",
			advice: []string{"remove the setting accelerator"}},
		"builtin": {options: Options{Hypervisor: Builtin}, hypervisor: "builtin: configured", accelerator: "kvm: KVM is usable"},
		"builtin, no vsock": {survey: survey{vsock: noVsock}, options: Options{Hypervisor: Builtin}, hypervisor: "builtin: configured",
			accelerator: "kvm: KVM is usable"},
		"kata":                {options: Options{Hypervisor: Kata}, hypervisor: "kata: configured", accelerator: "kvm: KVM is usable"},
		"kata without KVM":    {survey: survey{kvm: noKVM}, options: Options{Hypervisor: Kata}, err: "/dev/kvm|modprobe kvm_amd", is: errdefs.IsFailedPrecondition},
		"kata without vsock":  {survey: survey{vsock: noVsock}, options: Options{Hypervisor: Kata}, err: "vhost-vsock|modprobe vhost_vsock", is: errdefs.IsFailedPrecondition},
		"kata and tcg":        {options: Options{Hypervisor: Kata, Accelerator: TCG}, err: "accelerator tcg", is: errdefs.IsInvalidArgument},
		"unknown hypervisor":  {options: Options{Hypervisor: "xen"}, err: `"xen"`, is: errdefs.IsInvalidArgument},
		"unknown accelerator": {options: Options{Accelerator: "hax"}, err: `"hax"`, is: errdefs.IsInvalidArgument},

		"own Kata": {survey: survey{driver: "qemu"}, options: Options{KataConfig: own},
			hypervisor: "kata: kata-config is configured", accelerator: "kvm: KVM is usable"},
		"own Kata without KVM": {survey: survey{kvm: noKVM, driver: "qemu"}, options: Options{KataConfig: own}, err: "modprobe kvm_amd", is: errdefs.IsFailedPrecondition},
		"own QEMU without vsock": {survey: survey{vsock: noVsock, driver: "qemu"}, options: Options{KataConfig: own},
			err: "modprobe vhost_vsock", is: errdefs.IsFailedPrecondition},
		"own Cloud Hypervisor without vsock": {survey: survey{vsock: noVsock, driver: "clh"}, options: Options{KataConfig: own},
			hypervisor: "kata: kata-config", accelerator: "kvm: KVM is usable"},
		"own remote hypervisor": {survey: survey{kvm: noKVM, vsock: noVsock, driver: "remote"}, options: Options{KataConfig: own, Accelerator: TCG},
			hypervisor: "kata: kata-config", accelerator: "tcg: configured"},
		"own QEMU and tcg": {survey: survey{driver: "qemu"}, options: Options{KataConfig: own, Accelerator: TCG}, err: "tcg", is: errdefs.IsInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := tt.survey.choose(tt.options)
			if tt.is != nil {
				for part := range strings.SplitSeq(tt.err, "|") {
					if err == nil || !tt.is(err) || !strings.Contains(err.Error(), part) {
						t.Errorf("%+v, %v, want an error with %q", r, err, part)
					}
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := r.Hypervisor + ": " + r.HypervisorReason; !strings.HasPrefix(got, tt.hypervisor) {
				t.Errorf("hypervisor %s, want %s", got, tt.hypervisor)
			}
			if got := r.Accelerator + ": " + r.AcceleratorReason; !strings.HasPrefix(got, tt.accelerator) {
				t.Errorf("accelerator %s, want %s", got, tt.accelerator)
			}
			if !slices.EqualFunc(r.Advice, tt.advice, strings.Contains) {
				t.Errorf("advice %q, want %q", r.Advice, tt.advice)
			}
		})
	}
}

// There is a route on every host that this test runs on.
func TestChooseOnThisHost(t *testing.T) {
	r, err := Choose(Options{CacheDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", r)
}

func TestChooseReadsKataConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kata.toml")
	if _, err := Choose(Options{KataConfig: path}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), path) {
		t.Errorf("missing: %v", err)
	}
	if err := os.WriteFile(path, []byte("[hypervisor.remote]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s := (machine{}).survey(Options{KataConfig: path}, false); s.driver != "remote" || s.err != nil {
		t.Errorf("driver %q, %v", s.driver, s.err)
	}
}
