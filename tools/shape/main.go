// Command shape prints figures about how the code is divided, so that a change can be measured: go run ./tools/shape [-dir PATH].
package main

import (
	"flag"
	"fmt"
	"go/ast"
	"go/token"
	"go/types"
	"log"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/tools/go/packages"
)

func main() {
	dir := flag.String("dir", ".", "the module's root folder")
	flag.Parse()
	log.SetFlags(0)
	if err := run(*dir); err != nil {
		log.Fatal(err)
	}
}

func run(dir string) error {
	fset := token.NewFileSet()
	mode := packages.NeedName | packages.NeedFiles | packages.NeedSyntax | packages.NeedTypes | packages.NeedTypesInfo | packages.NeedImports | packages.NeedDeps
	pkgs, err := packages.Load(&packages.Config{Mode: mode, Dir: dir, Fset: fset}, ".", "./internal/...", "./smtptest")
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	visible := 0
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			visible++
		}
	}
	fmt.Printf("%6d  entries in the root folder\n", visible)

	lines, long, mutexes := 0, 0, 0
	for _, p := range pkgs {
		if strings.Contains(p.PkgPath, "/internal/test") || strings.HasSuffix(p.PkgPath, "/relaytest") || strings.HasSuffix(p.PkgPath, "/netpipe") {
			continue
		}
		for _, f := range p.Syntax {
			n := fset.Position(f.End()).Line
			lines += n
			if n > 500 {
				long++
				fmt.Printf("        %s has %d lines\n", filepath.Base(fset.Position(f.Pos()).Filename), n)
			}
		}
		for _, name := range p.Types.Scope().Names() {
			if s, ok := p.Types.Scope().Lookup(name).Type().Underlying().(*types.Struct); ok {
				if _, isType := p.Types.Scope().Lookup(name).(*types.TypeName); !isType {
					continue
				}
				fields, bools := 0, 0
				for i := range s.NumFields() {
					fields++
					switch t := s.Field(i).Type(); t.String() {
					case "bool", "sync/atomic.Bool":
						bools++
					case "sync.Mutex", "sync.RWMutex":
						mutexes++
					}
				}
				switch name {
				case "Conn", "Transaction", "session", "transaction", "pool", "gate", "ending":
					fmt.Printf("%6d  fields of %s.%s, of which %d are booleans\n", fields, p.Name, name, bools)
				}
			}
		}
	}
	fmt.Printf("%6d  lines of Go in the root, internal and smtptest, without tests and their tools\n", lines)
	fmt.Printf("%6d  files of more than 500 lines\n", long)
	fmt.Printf("%6d  fields that are mutexes\n", mutexes)

	root := slices.IndexFunc(pkgs, func(p *packages.Package) bool { return p.Name == "smtprelay" })
	both, pairs := mutual(fset, pkgs[root])
	fmt.Printf("%6d  of %d pairs of root files that use each other do so both ways\n", both, pairs)
	return nil
}

// mutual counts the pairs of files of p of which one uses what the other declares, and those where both do.
func mutual(fset *token.FileSet, p *packages.Package) (both, pairs int) {
	file := func(pos token.Pos) string { return fset.Position(pos).Filename }
	knows := map[[2]string]bool{}
	for _, f := range p.Syntax {
		ast.Inspect(f, func(n ast.Node) bool {
			id, ok := n.(*ast.Ident)
			if !ok {
				return true
			}
			if obj := p.TypesInfo.Uses[id]; obj != nil && obj.Pkg() == p.Types {
				if from, to := file(id.Pos()), file(obj.Pos()); from != to {
					knows[[2]string{from, to}] = true
				}
			}
			return true
		})
	}
	for k := range knows {
		back := knows[[2]string{k[1], k[0]}]
		if back {
			both++
		}
		if !back || k[0] < k[1] {
			pairs++
		}
	}
	return both / 2, pairs
}
