package network

import (
	"fmt"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	nfnetlink "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// tableName is the name of the table with the rules of a slot.
const tableName = "msb"

// rulesTimeout is how long the kernel may take to answer. It answers at once, but an error for the whole transaction only
// with one message, where package nftables waits for one per rule.
const rulesTimeout = 10 * time.Second

// addRules adds the rules of a slot to the calling thread's network namespace, in one transaction:
//
//	table inet msb {
//		chain prerouting {
//			type filter hook prerouting priority raw; policy accept;
//			meta nfproto != ipv4 drop
//			iifname "tap0" ip saddr != 10.0.2.15 drop
//		}
//		chain input {
//			type filter hook input priority filter; policy drop;
//			ct state established,related accept
//		}
//		chain forward { type filter hook forward priority filter; policy drop; }
//		chain output {
//			type filter hook output priority filter; policy drop;
//			oifname "tap0" ip daddr 10.0.2.15 accept
//		}
//	}
//
// ARP does not pass through them, so the guest can find the tap's hardware address.
func addRules() error {
	conn, err := nftables.New(nftables.WithSockOptions(func(c *nfnetlink.Conn) error {
		return c.SetReadDeadline(time.Now().Add(rulesTimeout))
	}))
	if err != nil {
		return err
	}
	table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: tableName})
	chain := func(name string, hook *nftables.ChainHook, priority *nftables.ChainPriority, policy nftables.ChainPolicy, rules ...[]expr.Any) {
		c := conn.AddChain(&nftables.Chain{
			Table: table, Name: name, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: priority, Policy: &policy,
		})
		for _, rule := range rules {
			conn.AddRule(&nftables.Rule{Table: table, Chain: c, Exprs: rule})
		}
	}
	chain("prerouting", nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept,
		rule(expr.VerdictDrop, isIPv4(expr.CmpOpNeq)),
		rule(expr.VerdictDrop, onTap(expr.MetaKeyIIFNAME), address(sourceOffset, expr.CmpOpNeq, guestIP)),
	)
	chain("input", nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop,
		rule(expr.VerdictAccept, established()),
	)
	chain("forward", nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
	chain("output", nftables.ChainHookOutput, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop,
		rule(expr.VerdictAccept, onTap(expr.MetaKeyOIFNAME), isIPv4(expr.CmpOpEq), address(destinationOffset, expr.CmpOpEq, guestIP)),
	)
	if err := conn.Flush(); err != nil {
		err = withFix(err, "load the modules for rules: modprobe -a nf_tables nft_ct",
			unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.ENOENT)
		return fmt.Errorf("add rules with nf_tables: %w", err)
	}
	return nil
}

// rule returns a rule with a verdict for the packets that meet all conditions.
func rule(verdict expr.VerdictKind, conditions ...[]expr.Any) []expr.Any {
	return append(slices.Concat(conditions...), &expr.Verdict{Kind: verdict})
}

// register is where a condition has what it compares.
const register = 1

func isIPv4(op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: register},
		&expr.Cmp{Op: op, Register: register, Data: []byte{unix.NFPROTO_IPV4}},
	}
}

// onTap is the condition that key, the name of an interface, is that of the tap.
func onTap(key expr.MetaKey) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, tapName)
	return []expr.Any{
		&expr.Meta{Key: key, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: name},
	}
}

// Offsets of the addresses in the header of an IPv4 packet.
const (
	sourceOffset      = 12
	destinationOffset = 16
)

// address is a condition for the address at offset of an IPv4 packet.
func address(offset uint32, op expr.CmpOp, ip []byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(len(ip))},
		&expr.Cmp{Op: op, Register: register, Data: ip},
	}
}

// established is the condition that a packet belongs to a connection that is allowed.
func established() []expr.Any {
	states := binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)
	none := make([]byte, len(states))
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: register},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: uint32(len(states)), Mask: states, Xor: none},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: none},
	}
}
