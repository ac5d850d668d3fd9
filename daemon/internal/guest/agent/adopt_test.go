package agent

import (
	"testing"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/proto"
)

// TestDifferentField compares specs that differ in one field from that of a template.
func TestDifferentField(t *testing.T) {
	template := diskContainer("template").OCI
	original := proto.CloneOf(template)
	for name, tt := range map[string]struct {
		change func(*pb.Spec)
		want   string
	}{
		"nothing":          {func(*pb.Spec) {}, ""},
		"hostname":         {func(s *pb.Spec) { s.Hostname = "other" }, ""},
		"root's path":      {func(s *pb.Spec) { s.Root.Path = "/other" }, ""},
		"annotation":       {func(s *pb.Spec) { s.Annotations["io.katacontainers.x"] = "y" }, ""},
		"cgroup":           {func(s *pb.Spec) { s.Linux.CgroupsPath = "/msb/other" }, ""},
		"read-only root":   {func(s *pb.Spec) { s.Root.Readonly = true }, "Root.Readonly"},
		"arguments":        {func(s *pb.Spec) { s.Process.Args = append(s.Process.Args, "x") }, "Process.Args"},
		"user":             {func(s *pb.Spec) { s.Process.User.UID = 1 }, "Process.User.UID"},
		"capabilities":     {func(s *pb.Spec) { s.Process.Capabilities = nil }, "Process.Capabilities"},
		"mount":            {func(s *pb.Spec) { s.Mounts[2].Options[0] = "x" }, "Mounts[2].options"},
		"additional mount": {func(s *pb.Spec) { s.Mounts = append(s.Mounts, s.Mounts[0]) }, "Mounts"},
		"memory":           {func(s *pb.Spec) { s.Linux.Resources.Memory.Limit++ }, "Linux.Resources.Memory.Limit"},
		"sysctl":           {func(s *pb.Spec) { s.Linux.Sysctl["a"] = "b" }, "Linux.Sysctl"},
		"no linux":         {func(s *pb.Spec) { s.Linux = nil }, "Linux"},
	} {
		spec := proto.CloneOf(template)
		tt.change(spec)
		if got := differentField(adoptable(template).ProtoReflect(), adoptable(spec).ProtoReflect()); got != tt.want {
			t.Errorf("%s: the different field is %q, want %q", name, got, tt.want)
		}
	}
	if !proto.Equal(template, original) {
		t.Error("the comparison changed the template's spec")
	}
}
