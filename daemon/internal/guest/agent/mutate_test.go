package agent

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// mutation gives one field of a message an extreme value.
type mutation struct {
	field string // the field's path and the value
	apply func(protoreflect.Message)
}

const (
	// manyEntries is the number of elements of an extreme list or map.
	manyEntries = 10_000
	// longEntry is the length of an entry that is too long to be repeated manyEntries times: a client cannot send more
	// than fits in a frame.
	longEntry = 400
	// notUTF8 is a placeholder, which encode replaces with bytes that are not UTF-8. Package proto refuses to encode such
	// bytes in a string.
	notUTF8 = "<not UTF-8>"
	// mutateDepth is how many levels of messages that the request leaves out are filled in.
	mutateDepth = 4
)

var extremeStrings = []string{
	"", "/", ".", "../../../../../../etc/passwd", "/proc/1/root", "a\x00b", "-1", "%s%n\r\n\x1b[2J", "\u202e\U0001f4a5",
	strings.Repeat("x", 64<<10), strings.Repeat("\x01", 1<<20), notUTF8,
}

// encode returns the encoding of m, in which notUTF8 is replaced with bytes that are not UTF-8.
func encode(m proto.Message) ([]byte, error) {
	data, err := proto.Marshal(m)
	return bytes.ReplaceAll(data, []byte(notUTF8), bytes.Repeat([]byte{0xff}, len(notUTF8))), err
}

// mutations returns the mutations of every field of m, including those in messages that m leaves out.
func mutations(m proto.Message) []mutation {
	var all []mutation
	root := m.ProtoReflect()
	mutateFields(root.Descriptor(), root, "", func(m protoreflect.Message) protoreflect.Message { return m }, 0, &all)
	return append(all, mutation{"unknown fields", func(m protoreflect.Message) {
		// Field 1000 as a varint, field 1001 as bytes, and the largest field number.
		m.SetUnknown([]byte{0xc0, 0x3e, 1, 0xca, 0x3e, 2, 'h', 'i', 0xfd, 0xff, 0xff, 0xff, 0x0f, 0, 0, 0, 0})
	}})
}

// mutateFields adds the mutations of one message to all. m is the message in the original request, or nil if the request
// leaves it out. at returns the message in a copy of the request, and creates it if it is missing.
func mutateFields(d protoreflect.MessageDescriptor, m protoreflect.Message, path string, at func(protoreflect.Message) protoreflect.Message, depth int, all *[]mutation) {
	fields := d.Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		name := path + string(f.Name())
		add := func(what string, apply func(parent protoreflect.Message)) {
			*all = append(*all, mutation{name + " " + what, func(root protoreflect.Message) { apply(at(root)) }})
		}
		if f.HasPresence() || f.IsList() || f.IsMap() {
			add("absent", func(p protoreflect.Message) { p.Clear(f) })
		}
		switch {
		case f.IsMap():
			mutateMap(f, add)
		case f.IsList():
			add("with many entries", func(p protoreflect.Message) {
				list := p.Mutable(f).List()
				entry := list.NewElement()
				if list.Len() > 0 && len(list.Get(0).String()) < longEntry {
					entry = list.Get(0)
				}
				for list.Len() < manyEntries {
					if f.Message() != nil {
						list.Append(protoreflect.ValueOfMessage(proto.Clone(entry.Message().Interface()).ProtoReflect()))
					} else {
						list.Append(entry)
					}
				}
			})
			first := func(p protoreflect.Message) protoreflect.List {
				list := p.Mutable(f).List()
				if list.Len() == 0 {
					list.Append(list.NewElement())
				}
				return list
			}
			if f.Message() == nil {
				for _, v := range extremes(f) {
					add("with "+describe(v), func(p protoreflect.Message) { first(p).Set(0, v) })
				}
				continue
			}
			add("with an empty entry", func(p protoreflect.Message) {
				list := p.Mutable(f).List()
				list.Append(list.NewElement())
			})
			var have protoreflect.Message
			if m != nil && m.Get(f).List().Len() > 0 {
				have = m.Get(f).List().Get(0).Message()
			}
			descend(f.Message(), have, name+"[0].", func(root protoreflect.Message) protoreflect.Message {
				return first(at(root)).Get(0).Message()
			}, depth, all)
		case f.Message() != nil:
			add("empty", func(p protoreflect.Message) { p.Set(f, p.NewField(f)) })
			var have protoreflect.Message
			if m != nil && m.Has(f) {
				have = m.Get(f).Message()
			}
			descend(f.Message(), have, name+".", func(root protoreflect.Message) protoreflect.Message {
				return at(root).Mutable(f).Message()
			}, depth, all)
		default:
			for _, v := range extremes(f) {
				add("= "+describe(v), func(p protoreflect.Message) { p.Set(f, v) })
			}
		}
	}
}

// descend calls mutateFields for a message, unless it is deeper than mutateDepth.
func descend(d protoreflect.MessageDescriptor, m protoreflect.Message, path string, at func(protoreflect.Message) protoreflect.Message, depth int, all *[]mutation) {
	if m == nil {
		depth++
	}
	if depth < mutateDepth {
		mutateFields(d, m, path, at, depth, all)
	}
}

// mutateMap adds the mutations of a map field.
func mutateMap(f protoreflect.FieldDescriptor, add func(string, func(protoreflect.Message))) {
	value := func(m protoreflect.Map) protoreflect.Value { return m.NewValue() }
	add("with many entries", func(p protoreflect.Message) {
		m := p.Mutable(f).Map()
		for i := range manyEntries {
			m.Set(protoreflect.ValueOf(fmt.Sprint("key", i)).MapKey(), value(m))
		}
	})
	for _, k := range extremes(f.MapKey()) {
		add("with key "+describe(k), func(p protoreflect.Message) {
			m := p.Mutable(f).Map()
			m.Set(k.MapKey(), value(m))
		})
	}
	if f.MapValue().Message() != nil {
		return
	}
	for _, v := range extremes(f.MapValue()) {
		add("with value "+describe(v), func(p protoreflect.Message) {
			p.Mutable(f).Map().Set(protoreflect.ValueOf("key").MapKey(), v)
		})
	}
}

// extremes returns extreme values for a scalar field: the ends of its type's range, and strings that are not meant for it.
func extremes(f protoreflect.FieldDescriptor) []protoreflect.Value {
	var values []protoreflect.Value
	add := func(list ...any) {
		for _, v := range list {
			values = append(values, protoreflect.ValueOf(v))
		}
	}
	switch f.Kind() {
	case protoreflect.BoolKind:
		add(false, true)
	case protoreflect.EnumKind:
		for _, n := range []int32{0, 99, -1, math.MaxInt32, math.MinInt32} {
			add(protoreflect.EnumNumber(n))
		}
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		add(int32(0), int32(1), int32(-1), int32(math.MaxInt32), int32(math.MinInt32))
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		add(int64(0), int64(1), int64(-1), int64(math.MaxInt64), int64(math.MinInt64))
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		add(uint32(0), uint32(1), uint32(math.MaxInt32), uint32(math.MaxUint32))
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		add(uint64(0), uint64(1), uint64(math.MaxInt64), uint64(math.MaxUint64))
	case protoreflect.FloatKind:
		add(float32(math.NaN()), float32(math.Inf(-1)), float32(math.MaxFloat32))
	case protoreflect.DoubleKind:
		add(math.NaN(), math.Inf(-1), math.MaxFloat64)
	case protoreflect.StringKind:
		for _, s := range extremeStrings {
			add(s)
		}
	case protoreflect.BytesKind:
		add([]byte{}, bytes.Repeat([]byte{0xff}, 1<<20))
	}
	return values
}

// describe returns a short text for a value.
func describe(v protoreflect.Value) string {
	s := fmt.Sprintf("%.20q", v.String())
	if _, ok := v.Interface().(string); !ok {
		s = fmt.Sprintf("%.20s", v.String())
	}
	if n := len(v.String()); n > 30 {
		s += fmt.Sprintf("… (%d bytes)", n)
	}
	return s
}

// mutated returns a copy of m with the mutations applied.
func mutated(m proto.Message, list ...mutation) proto.Message {
	clone := proto.Clone(m)
	for _, change := range list {
		change.apply(clone.ProtoReflect())
	}
	return clone
}

// pick returns n random mutations of all, or all of them in random order if n < 0.
func pick(rnd *rand.Rand, all []mutation, n int) []mutation {
	rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	if n < 0 || n > len(all) {
		return all
	}
	return all[:n]
}

// TestMutations checks that mutations covers the fields of the largest request.
func TestMutations(t *testing.T) {
	good := &pb.CreateContainerRequest{ContainerId: "a", OCI: buildSpec("a")}
	before := proto.Clone(good)
	all := mutations(good)
	fields, changed := make(map[string]bool), 0
	for _, m := range all {
		if fields[m.field] {
			t.Errorf("mutation %q exists twice", m.field)
		}
		fields[m.field] = true
		bad := mutated(good, m)
		if !proto.Equal(good, bad) {
			changed++
		}
		data, err := encode(bad)
		if err != nil {
			t.Errorf("mutation %q: encode: %v", m.field, err)
		}
		if err := proto.Unmarshal(data, &pb.CreateContainerRequest{}); (err != nil) != strings.Contains(m.field, notUTF8) {
			t.Errorf("mutation %q: decode: %v", m.field, err)
		}
	}
	for _, want := range []string{
		"OCI absent", `container_id = "a\x00b"`, "OCI.Mounts[0].options with many entries", "OCI.Linux.Resources.CPU.Quota = -9223372036854775808",
		`OCI.Linux.Sysctl with key ""`, "OCI.Linux.Seccomp.Syscalls[0].Args[0].Value = 1", "storages[0].fs_group.group_change_policy = 99", "unknown fields",
	} {
		if !fields[want] {
			t.Errorf("mutation %q is not among the %d mutations", want, len(all))
		}
	}
	if changed < len(all)*9/10 {
		t.Errorf("only %d of %d mutations change the request", changed, len(all))
	}
	if !proto.Equal(good, before) {
		t.Error("mutated changed its argument")
	}
}
