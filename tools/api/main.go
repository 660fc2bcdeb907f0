// Api prints the exported identifiers of every package that others may import, one per line, so that a diff shows a change:
//
//	go run ./tools/api                     # from the root of the repository
//	go run ./tools/api >tools/api/api.txt  # renew the file that .ci/run compares; or: make api
package main

import (
	"errors"
	"fmt"
	"go/types"
	"os"
	"slices"
	"strings"

	"golang.org/x/tools/go/packages"
)

const module = "github.com/smtprelay/smtprelay"

func main() {
	lines, err := surface()
	if err != nil {
		fmt.Fprintln(os.Stderr, "api:", err)
		os.Exit(1)
	}
	fmt.Println(strings.Join(lines, "\n"))
}

// surface returns the sorted lines of all importable packages of the workspace.
func surface() ([]string, error) {
	pkgs, err := packages.Load(&packages.Config{
		Mode: packages.NeedName | packages.NeedTypes | packages.NeedImports | packages.NeedDeps,
		Env:  append(os.Environ(), "GOOS=linux", "GOARCH=amd64", "CGO_ENABLED=0"),
	}, module+"/...")
	if err != nil {
		return nil, err
	}
	if packages.PrintErrors(pkgs) > 0 {
		return nil, errors.New("the packages do not compile")
	}
	var lines []string
	for _, p := range pkgs {
		if importable(p) {
			lines = append(lines, declarations(p.Types)...)
		}
	}
	slices.Sort(lines)
	return slices.Compact(lines), nil
}

// importable reports whether others may import p.
func importable(p *packages.Package) bool {
	below := strings.TrimPrefix(p.PkgPath, module) + "/"
	return p.Name != "main" && !strings.Contains(below, "/internal/") &&
		!strings.HasPrefix(below, "/examples/") && !strings.HasPrefix(below, "/tools/")
}

// declarations returns a line for each exported name of a package, and for each exported field and method of its types.
func declarations(p *types.Package) []string {
	relative := func(other *types.Package) string {
		if other == p {
			return ""
		}
		return other.Path()
	}
	var lines []string
	line := func(format string, args ...any) {
		lines = append(lines, p.Path()+": "+strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", " "))
	}
	for _, name := range p.Scope().Names() {
		obj := p.Scope().Lookup(name)
		if !obj.Exported() {
			continue
		}
		switch obj := obj.(type) {
		case *types.Const:
			line("const %s %s = %s", name, types.TypeString(obj.Type(), relative), obj.Val().ExactString())
		case *types.TypeName:
			for _, l := range typeLines(obj, relative) {
				line("%s", l)
			}
		default:
			line("%s", types.ObjectString(obj, relative))
		}
	}
	return lines
}

// typeLines returns the lines of one exported type: its kind, fields and methods. A struct's own line says whether it is
// comparable and whether it has unexported fields: users may depend on both.
func typeLines(obj *types.TypeName, relative types.Qualifier) []string {
	name := obj.Name()
	if obj.IsAlias() {
		return []string{"type " + name + " = " + types.TypeString(types.Unalias(obj.Type()), relative)}
	}
	named, ok := obj.Type().(*types.Named)
	if !ok {
		return []string{types.ObjectString(obj, relative)}
	}
	var lines []string
	if s, ok := named.Underlying().(*types.Struct); ok {
		kind, hidden := "type "+name+typeParams(named, relative)+" struct", false
		for f := range s.Fields() {
			if !f.Exported() {
				hidden = true
				continue
			}
			word := "field"
			if f.Embedded() {
				word = "embedded field"
			}
			lines = append(lines, fmt.Sprintf("%s %s.%s %s", word, name, f.Name(), types.TypeString(f.Type(), relative)))
		}
		if hidden {
			kind += ", with unexported fields"
		}
		if types.Comparable(named) {
			kind += ", comparable"
		}
		lines = append(lines, kind)
	} else {
		lines = append(lines, "type "+name+typeParams(named, relative)+" "+types.TypeString(named.Underlying(), relative))
	}
	for m := range named.Methods() {
		if m.Exported() {
			receiver := types.TypeString(m.Signature().Recv().Type(), relative)
			signature := strings.TrimPrefix(types.TypeString(m.Type(), relative), "func")
			lines = append(lines, fmt.Sprintf("method (%s) %s%s", receiver, m.Name(), signature))
		}
	}
	return lines
}

func typeParams(named *types.Named, relative types.Qualifier) string {
	var params []string
	for p := range named.TypeParams().TypeParams() {
		params = append(params, p.Obj().Name()+" "+types.TypeString(p.Constraint(), relative))
	}
	if params == nil {
		return ""
	}
	return "[" + strings.Join(params, ", ") + "]"
}
