// Here belongs what tells two values apart, what cannot be read, and that a copy shares nothing with what it was made of.
package fingerprint

import (
	"errors"
	"net/smtp"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
)

type inner struct{ text string }

type all struct {
	a, b  string
	n     int
	u     uint8
	f     float64
	yes   bool
	bytes []byte
	list  [2]int
	in    *inner
	deep  **inner
}

func sample() *all {
	deep := &inner{"deep"}
	return &all{a: "x", b: "y", n: -1, u: 2, f: 0.5, yes: true, bytes: []byte("k"), list: [2]int{1, 2}, in: &inner{"in"}, deep: &deep}
}

func TestWhatDiffersHasAnotherSum(t *testing.T) {
	first, whole := Of(sample())
	if again, _ := Of(sample()); again != first || !whole {
		t.Fatal("two values that are equal differ, or cannot be read")
	}
	for why, edit := range map[string]func(*all){
		"a string":               func(v *all) { v.a = "z" },
		"where one text ends":    func(v *all) { v.a, v.b = "xy", "" },
		"a number":               func(v *all) { v.n = 1 },
		"an unsigned number":     func(v *all) { v.u = 3 },
		"a fraction":             func(v *all) { v.f = 0.25 },
		"a switch":               func(v *all) { v.yes = false },
		"bytes":                  func(v *all) { v.bytes[0] = 'l' },
		"no bytes":               func(v *all) { v.bytes = nil },
		"an element":             func(v *all) { v.list[1] = 3 },
		"what is pointed to":     func(v *all) { v.in.text = "out" },
		"nothing is pointed to":  func(v *all) { v.in = nil },
		"what is behind a chain": func(v *all) { (*v.deep).text = "deeper" },
	} {
		v := sample()
		edit(v)
		if got, whole := Of(v); got == first || !whole {
			t.Errorf("%s: the same sum, or it cannot be read", why)
		}
	}
}

func TestTypesOfOneNameAreTwo(t *testing.T) {
	one := func() any {
		type auth struct{ key string }
		return &auth{"k"}
	}
	other := func() any {
		type auth struct{ key string }
		return &auth{"k"}
	}
	a, _ := Of(one())
	b, _ := Of(other())
	if a == b {
		t.Error("they have the same sum")
	}
}

func TestWhatCannotBeReadIsSaid(t *testing.T) {
	type ring struct{ next *ring }
	loop := &ring{}
	loop.next = loop
	for why, v := range map[string]any{
		"a func":                &struct{ f func() }{func() {}},
		"a func itself":         func() {},
		"an interface":          &struct{ err error }{errors.ErrUnsupported},
		"a map":                 &struct{ m map[string]int }{map[string]int{}},
		"a channel":             &struct{ c chan int }{make(chan int)},
		"a lock":                &struct{ mu sync.Mutex }{},
		"an atomic":             &struct{ n atomic.Int64 }{},
		"one that holds itself": loop,
	} {
		if _, whole := Of(v); whole {
			t.Errorf("%s: it was read", why)
		}
	}
	if _, whole := Of(&struct {
		f   func()
		err error
	}{}); !whole {
		t.Error("what is not there cannot be read")
	}
}

func TestCopySharesNothing(t *testing.T) {
	v := sample()
	c := Copy(any(v)).(*all)
	if !reflect.DeepEqual(v, c) {
		t.Fatalf("got %+v, want %+v", c, v)
	}
	v.a, v.in.text, (*v.deep).text, v.bytes[0] = "changed", "changed", "changed", 'x'
	if !reflect.DeepEqual(c, sample()) {
		t.Errorf("got %+v, which has changed with what it was made of", c)
	}
}

func TestAuthOfNetSMTPIsReadAndCopied(t *testing.T) {
	a, whole := Of(smtp.PlainAuth("", "u", "p", "h"))
	b, _ := Of(smtp.PlainAuth("", "u", "p", "h"))
	c, _ := Of(smtp.PlainAuth("", "u", "q", "h"))
	if a != b || a == c || !whole {
		t.Error("equal ones differ, different ones are equal, or they cannot be read")
	}
	if proto, ir, err := Copy(smtp.PlainAuth("", "u", "p", "localhost")).Start(&smtp.ServerInfo{Name: "localhost"}); proto != "PLAIN" || string(ir) != "\x00u\x00p" || err != nil {
		t.Errorf("the copy says %q, %q, %v", proto, ir, err)
	}
}
