package portal

import (
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// account is a user of the sandbox, with the group and the groups that its processes have.
type account struct {
	uid, gid   uint32
	groups     []uint32
	name, home string // name is the uid in decimal if /etc/passwd does not have the user
	named      bool   // false if it was looked up as ""
}

// lookupUser returns the account for spec, which is a name or number, optionally followed by ":" and a group. For "", it
// returns the account of the portal itself, which is that of the image. Errors are gRPC statuses. As in an image's
// configuration, a number needs no entry in /etc/passwd; its group is then 0.
func lookupUser(spec string) (*account, error) {
	if spec == "" {
		return ownAccount(), nil
	}
	name, group, hasGroup := strings.Cut(spec, ":")
	a, err := namedAccount(name)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "user %q does not exist in the sandbox", name)
	}
	a.named = true
	if !hasGroup {
		return a, nil
	}
	if a.gid, err = lookupGroup(group); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "group %q does not exist in the sandbox", group)
	}
	a.groups = []uint32{a.gid}
	return a, nil
}

// ownAccount returns the account of the portal, as it was at the first call: a look at /etc/passwd for each process would take
// about 2 ms in an emulated guest.
var ownAccount = sync.OnceValue(func() *account {
	a := &account{uid: uint32(os.Getuid()), gid: uint32(os.Getgid()), home: os.Getenv("HOME")}
	a.name = fmt.Sprint(a.uid)
	groups, _ := os.Getgroups()
	for _, g := range groups {
		a.groups = append(a.groups, uint32(g))
	}
	if u, err := user.LookupId(a.name); err == nil {
		a.name = u.Username
		if a.home == "" {
			a.home = u.HomeDir
		}
	}
	if a.home == "" {
		a.home = "/"
	}
	return a
})

// namedAccount returns the account of the user with this name or number.
func namedAccount(name string) (*account, error) {
	u, err := user.Lookup(name)
	if err != nil {
		uid, numberErr := parseID(name)
		if numberErr != nil {
			return nil, err
		}
		if u, err = user.LookupId(fmt.Sprint(uid)); err != nil {
			return &account{uid: uid, groups: []uint32{0}, name: fmt.Sprint(uid), home: "/"}, nil
		}
	}
	a := &account{name: u.Username, home: u.HomeDir}
	if a.uid, err = parseID(u.Uid); err != nil {
		return nil, err
	}
	if a.gid, err = parseID(u.Gid); err != nil {
		return nil, err
	}
	if a.home == "" {
		a.home = "/"
	}
	ids, err := u.GroupIds()
	if err != nil {
		ids = []string{u.Gid} // the image has no readable /etc/group
	}
	for _, id := range ids {
		if gid, err := parseID(id); err == nil {
			a.groups = append(a.groups, gid)
		}
	}
	return a, nil
}

// lookupGroup returns the id of the group with this name or number.
func lookupGroup(name string) (uint32, error) {
	if g, err := user.LookupGroup(name); err == nil {
		return parseID(g.Gid)
	}
	return parseID(name)
}

// parseID parses the number of a user or group. The kernel reserves the largest number.
func parseID(s string) (uint32, error) {
	id, err := strconv.ParseUint(s, 10, 32)
	if err == nil && id == 1<<32-1 {
		err = strconv.ErrRange
	}
	return uint32(id), err
}

// own reports whether a has the user and group of the portal, so that its processes need no other credentials.
func (a *account) own() bool { return int(a.uid) == os.Getuid() && int(a.gid) == os.Getgid() }

// credential returns the credentials for a process of the account, or nil for those of the portal. It returns a gRPC
// status if the portal may not start processes of the account.
func (a *account) credential() (*syscall.Credential, error) {
	switch {
	case a.own():
		return nil, nil
	case os.Getuid() != 0:
		return nil, status.Errorf(codes.FailedPrecondition,
			"the sandbox's image runs as user %d, which cannot become user %q: use an image that runs as root", os.Getuid(), a.name)
	}
	return &syscall.Credential{Uid: a.uid, Gid: a.gid, Groups: a.groups}, nil
}
