// Here belongs what a Registry tells Configs apart by. What it does with Clients is in test/.
package smtprelay

import (
	"context"
	"crypto/tls"
	"net"
	"reflect"
	"testing"

	"github.com/smtprelay/smtprelay/internal/fingerprint"
)

// noSlots has no place for anybody.
type noSlots struct{ Slots }

// Of each field there is, those that come later included, another value is another Client, or needs a Name.
func TestEachFieldOfAConfigTellsItsClientFromOthers(t *testing.T) {
	seen := map[fingerprint.Sum]string{}
	key := func(c Config) fingerprint.Sum {
		sum, err := c.key()
		if err != nil {
			t.Fatal(err)
		}
		return sum
	}
	seen[key(Config{})] = "nothing"
	var walk func(path string, c *Config, v reflect.Value)
	walk = func(path string, c *Config, v reflect.Value) {
		for i := range v.NumField() {
			f, name := v.Field(i), path+v.Type().Field(i).Name
			if !f.CanSet() {
				continue
			}
			switch f.Kind() {
			case reflect.Struct:
				walk(name+".", c, f)
				continue
			case reflect.String:
				f.SetString("x")
			case reflect.Bool:
				f.SetBool(true)
			case reflect.Int, reflect.Int64:
				f.SetInt(1)
			case reflect.Float64:
				f.SetFloat(1)
			case reflect.Func:
				f.Set(reflect.MakeFunc(f.Type(), func([]reflect.Value) []reflect.Value { return nil }))
			case reflect.Pointer:
				f.Set(reflect.New(f.Type().Elem()))
			case reflect.Interface:
				f.Set(reflect.ValueOf(noSlots{}))
			default:
				t.Errorf("%s is a %v, which the test does not know", name, f.Kind())
				continue
			}
			if f.Kind() == reflect.Func || f.Kind() == reflect.Pointer || f.Kind() == reflect.Interface {
				if _, err := c.key(); err == nil {
					t.Errorf("%s needs no Name", name)
				}
				c.Name = "shop"
			}
			sum := key(*c)
			if other, ok := seen[sum]; ok {
				t.Errorf("%s and %s: the same", name, other)
			}
			seen[sum] = name
			f.SetZero()
			c.Name = ""
		}
	}
	var c Config
	walk("", &c, reflect.ValueOf(&c).Elem())
}

func TestWhatATLSConfigSaysOfTheNameTellsClientsApart(t *testing.T) {
	one := Config{Name: "shop", TLSConfig: &tls.Config{ServerName: "a.example"}}
	same := Config{Name: "shop", TLSConfig: &tls.Config{ServerName: "a.example"}, Dial: nil}
	other := Config{Name: "shop", TLSConfig: &tls.Config{ServerName: "b.example"}}
	unsafe := Config{Name: "shop", TLSConfig: &tls.Config{ServerName: "a.example", InsecureSkipVerify: true}}
	dialled := Config{Name: "shop", Dial: func(context.Context, string, string) (net.Conn, error) { return nil, nil }}
	a, _ := one.key()
	for why, want := range map[string]struct {
		c    Config
		same bool
	}{"the same": {same, true}, "another name": {other, false}, "not verified": {unsafe, false}, "by a dialler": {dialled, false}} {
		if b, _ := want.c.key(); (a == b) != want.same {
			t.Errorf("%s: got the same: %v", why, a == b)
		}
	}
}
