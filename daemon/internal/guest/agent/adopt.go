package agent

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// templatePrefix begins the id of the container of a template, and no other. A template is the saved state of a guest whose
// container runs, and from which msbd restores the guests of sandboxes. In a restored guest, the shim creates the container of the
// sandbox, and the agent gives it the template's container.
const templatePrefix = "template-"

// template returns the only container, if it is that of a template, or nil. The caller holds mu.
func (a *agent) template() *containerEntry {
	if len(a.containers) != 1 {
		return nil
	}
	for id, c := range a.containers {
		if strings.HasPrefix(id, templatePrefix) {
			return c
		}
	}
	return nil
}

// restored reports whether the guest has the container of a template.
func (a *agent) restored() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.template() != nil
}

// adopt makes the container of a template the one that req asks for, and reports whether it has done this. It does nothing if
// the only container is not a template's, or if req is for a root that is not on the disks. The caller holds lifecycleMu.
func (a *agent) adopt(req *pb.CreateContainerRequest) (bool, error) {
	a.mu.Lock()
	template := a.template()
	a.mu.Unlock()
	if template == nil || req.OCI.Annotations[rootAnnotation] != rootOnDisks {
		return false, nil
	}
	difference := differentField(adoptable(template.spec).ProtoReflect(), adoptable(req.OCI).ProtoReflect())
	if len(req.Storages) > 0 {
		difference = "storages"
	}
	if difference != "" {
		return false, fmt.Errorf("container %s differs from that of the template in its %s: %w", req.ContainerId, difference, errdefs.ErrFailedPrecondition)
	}
	old := template.ID()
	if err := template.Adopt(req.ContainerId, req.OCI.Hostname); err != nil {
		return false, fmt.Errorf("adopt the container of the template: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.containers, old)
	a.containers[req.ContainerId] = template
	return true, nil
}

// adoptable returns spec without what may differ between the container of a template and the one that adopts it. The path of
// a root on disks is not used.
func adoptable(spec *pb.Spec) *pb.Spec {
	spec = proto.CloneOf(spec)
	spec.Hostname, spec.Root.Path = "", ""
	spec.Annotations = map[string]string{rootAnnotation: spec.Annotations[rootAnnotation]}
	if spec.Linux != nil {
		spec.Linux.CgroupsPath = ""
	}
	return spec
}

// differentField returns the path of the first field in which two messages of the same type differ, or "" if they are equal.
func differentField(a, b protoreflect.Message) string {
	fields := a.Descriptor().Fields()
	for i := range fields.Len() {
		field := fields.Get(i)
		x, y, name := a.Get(field), b.Get(field), string(field.Name())
		switch {
		case a.Has(field) == b.Has(field) && x.Equal(y):
			continue
		case field.IsMap() || a.Has(field) != b.Has(field):
		case field.IsList() && field.Message() != nil:
			for n := range min(x.List().Len(), y.List().Len()) {
				if inner := differentField(x.List().Get(n).Message(), y.List().Get(n).Message()); inner != "" {
					return name + "[" + strconv.Itoa(n) + "]." + inner
				}
			}
		case !field.IsList() && field.Message() != nil:
			return name + "." + differentField(x.Message(), y.Message())
		}
		return name
	}
	return ""
}
