// Package fingerprint hashes and copies values by their contents. It is used as the key of pools: two configurations that mean
// the same connection have the same Sum.
package fingerprint

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"math"
	"reflect"
	"strings"
)

// Sum is a SHA-256 with a random key of this process, so that a Sum in a memory dump cannot be used to guess passwords.
type Sum [sha256.Size]byte

var key = func() (k [32]byte) {
	rand.Read(k[:])
	return k
}()

// depth limits how far nested values are followed, because a value may contain itself.
const depth = 8

// Of returns the Sum of v, of its type and its contents, and whether the Sum covers all contents: funcs, channels, maps,
// interfaces and the types of package sync cannot be read and are left out. Unexported fields are included.
func Of(v any) (sum Sum, whole bool) {
	h := sha256.New()
	h.Write(key[:])
	whole = true
	if v != nil {
		value := reflect.ValueOf(v)
		number(h, uint64(reflect.ValueOf(value.Type()).Pointer())) // type names are not unique
		whole = write(h, value, depth)
	}
	h.Sum(sum[:0])
	return sum, whole
}

func number(h hash.Hash, n uint64) { h.Write(binary.BigEndian.AppendUint64(nil, n)) }

// write adds v to h, each part in a self-delimiting form, and reports whether it could read all of v.
func write(h hash.Hash, v reflect.Value, depth int) bool {
	if depth == 0 {
		return v.IsZero()
	}
	switch v.Kind() {
	case reflect.Bool:
		number(h, map[bool]uint64{true: 1}[v.Bool()])
	case reflect.String:
		number(h, uint64(v.Len()))
		h.Write([]byte(v.String()))
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		number(h, uint64(v.Int()))
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uintptr:
		number(h, v.Uint())
	case reflect.Float32, reflect.Float64:
		number(h, math.Float64bits(v.Float()))
	case reflect.Struct:
		return writeFields(h, v, depth)
	case reflect.Array, reflect.Slice:
		return writeElements(h, v, depth)
	case reflect.Pointer:
		number(h, map[bool]uint64{true: 1}[v.IsNil()])
		return v.IsNil() || write(h, v.Elem(), depth-1)
	default:
		return v.IsZero() // nil
	}
	return true
}

func writeFields(h hash.Hash, v reflect.Value, depth int) bool {
	if pkg := v.Type().PkgPath(); pkg == "sync" || strings.HasPrefix(pkg, "sync/") {
		return false // another goroutine may hold the lock now
	}
	whole := true
	for i := range v.NumField() {
		whole = write(h, v.Field(i), depth-1) && whole
	}
	return whole
}

func writeElements(h hash.Hash, v reflect.Value, depth int) bool {
	if v.Kind() == reflect.Slice {
		number(h, map[bool]uint64{true: 1}[v.IsNil()])
	}
	number(h, uint64(v.Len()))
	whole := true
	for i := range v.Len() {
		whole = write(h, v.Index(i), depth-1) && whole
	}
	return whole
}

// Copy returns a deep copy of v. Of must be able to read all of v.
func Copy[T any](v T) T {
	made := reflect.New(reflect.TypeFor[T]()).Elem()
	made.Set(reflect.ValueOf(&v).Elem())
	part(made)
	return made.Interface().(T)
}

// part replaces everything that v points to by copies. v must be addressable; it may be unexported.
func part(v reflect.Value) {
	switch v.Kind() {
	case reflect.Interface:
		if !v.IsNil() {
			inner := reflect.New(v.Elem().Type()).Elem()
			inner.Set(v.Elem())
			part(inner)
			v.Set(inner)
		}
	case reflect.Pointer:
		if !v.IsNil() {
			target := reflect.New(v.Type().Elem())
			target.Elem().Set(exported(v).Elem())
			part(target.Elem())
			exported(v).Set(target)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			part(exported(v.Field(i)))
		}
	case reflect.Slice:
		if !v.IsNil() {
			made := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
			reflect.Copy(made, exported(v))
			for i := range made.Len() {
				part(made.Index(i))
			}
			exported(v).Set(made)
		}
	case reflect.Array:
		for i := range v.Len() {
			part(v.Index(i))
		}
	}
}

// exported returns v, which must be addressable, as if it were an exported field.
func exported(v reflect.Value) reflect.Value {
	return reflect.NewAt(v.Type(), v.Addr().UnsafePointer()).Elem()
}
